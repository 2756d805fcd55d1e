"""Structured output: which tokens keep a text on the way to the form that was asked for.

Grammars are llguidance's: they are followed token by token instead of being expanded beforehand,
and every phase has a budget, so that a schema that explodes is cut off with an error.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qoq.engine import structural_tag
from qoq.engine.structured_params import StructuredOutputsParams
from qoq.errors import RequestError
from qoq.tokenizer import Tokenizer

MAX_SPEC_BYTES = 256 << 10
CACHED_GRAMMARS = 128
# Budgets in llguidance's units; what each takes at most on one core: a second or so to build, some
# ten milliseconds for a mask.
_LIMITS = {
    "max_grammar_size": 100_000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_items_in_row": 2_000,
    "max_lexer_states": 50_000,
}
# Between two marks of JSON. Without a bound, a small model may write spaces for ever.
_WHITESPACE = r"[ \t\r\n]{1,40}"


class Grammars:
    """Compiles structures for one vocabulary and remembers the latest. Safe to share by threads."""

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, *, cached: int = CACHED_GRAMMARS
    ) -> None:
        """vocab_size: the length of a row of logits. RequestError without llguidance."""
        self._guidance = _llguidance()
        self._vocab_size = vocab_size
        self._tokenizer = self._vocabulary(tokenizer, vocab_size)
        self._cached = cached
        self._compiled: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(
        self, structure: StructuredOutputsParams, end_ids: Collection[int] = ()
    ) -> "StructureMatcher":
        """A matcher at its beginning; ``end_ids`` may end the text once its form is complete.

        Raises RequestError for a structure that is wrong, not supported or too large.
        """
        spec = structure.spec()
        with self._lock:
            compiled = self._compiled.get(spec)
            if compiled is not None:
                self._compiled.move_to_end(spec)
        if compiled is None:
            compiled = self._compile(*spec)
            with self._lock:
                self._compiled[spec] = compiled
                while len(self._compiled) > self._cached:
                    self._compiled.popitem(last=False)
        return StructureMatcher(compiled.deep_copy(), self._eos_ids, end_ids, self._vocab_size)

    def _compile(self, kind: str, text: str) -> Any:
        size = len(text.encode())
        if size > MAX_SPEC_BYTES:
            raise RequestError(
                f"structured_outputs: the {kind} has {size} bytes; at most {MAX_SPEC_BYTES} are "
                "compiled. Make it smaller."
            )
        guidance = self._guidance
        try:
            grammar = self._grammar(kind, text)
        except Exception as error:  # its converters raise what they like
            raise RequestError(_complaint(kind, str(error))) from error
        limits = guidance.LLParserLimits(**_LIMITS, verbose_errors=False)
        matcher = guidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        trial = matcher.deep_copy()
        if not trial.is_error():
            trial.compute_bitmask()  # what is too large or fits no text often shows at once
        if trial.is_error():
            raise RequestError(_complaint(kind, trial.get_error()))
        return matcher

    def _vocabulary(self, tokenizer: Tokenizer, vocab_size: int) -> Any:
        backend = getattr(tokenizer.hf, "backend_tokenizer", None)
        if backend is None:
            raise RequestError("structured_outputs needs a tokenizer.json; this model has none.")
        state = backend.to_str()
        known = max(vocab_size, len(tokenizer))
        self._eos_ids = tokenizer.eos_ids
        eos = list(tokenizer.eos_ids) or None
        made = self._guidance.LLTokenizer(_without_padding(state), n_vocab=known, eos_token=eos)
        added = tokenizer.hf.added_tokens_decoder
        special = {str(token.content): i for i, token in added.items() if made.is_special_token(i)}
        self._special = special
        # What llguidance takes for special by its looks, and the tokenizer for text (<think>).
        self._free = [i for i in special.values() if i not in tokenizer.special_ids]
        return made

    def _grammar(self, kind: str, text: str) -> str:
        """A structure in llguidance's own notation."""
        if kind == "structural_tag":
            tag = json.loads(text)
            return structural_tag.lark(tag, self._special, self._free, _WHITESPACE)
        return _grammar(kind, text, self._guidance)


class StructureMatcher:
    """How far one text has come in its form."""

    def __init__(
        self, matcher: Any, eos_ids: Collection[int], end_ids: Collection[int], vocab_size: int
    ) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._ends = [i for i in end_ids if i < vocab_size]
        self._not_ends = [i for i in eos_ids if i not in end_ids and i < vocab_size]
        self.error: str | None = None

    def mask(self, row: Tensor) -> None:
        """Forbid, in place, what cannot come next in the row of logits fp32 [V]."""
        allowed = self.allowed()
        row.masked_fill_(~torch.from_numpy(allowed).to(row.device), -torch.inf)

    def allowed(self) -> "np.ndarray[Any, np.dtype[np.bool_]]":
        """bool [V]: which ids may come next. All, and ``error`` is set, if that is too hard."""
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._note_error()
        if self.error is not None:
            return np.ones(self._vocab_size, dtype=np.bool_)
        bits = np.unpackbits(packed, bitorder="little")[: self._vocab_size].astype(np.bool_)
        bits[self._not_ends] = False
        if self._matcher.is_accepting():
            bits[self._ends] = True
        return bits

    def accept(self, token_id: int) -> bool:
        """Go on by an id that was allowed; True where nothing can follow it any more."""
        self._matcher.consume_token(token_id)
        self._note_error()
        return self.error is None and bool(self._matcher.is_stopped())

    def _note_error(self) -> None:
        if self._matcher.is_error():
            reason = _first_line(self._matcher.get_error())
            self.error = f"structured_outputs cannot be followed any further: {reason}"


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise RequestError(
            "structured_outputs needs the package llguidance; install it with "
            "`pip install llguidance`."
        ) from error
    return llguidance


def _grammar(kind: str, text: str, guidance: Any) -> str:
    """A structure in llguidance's own notation."""
    if kind in ("json", "json_object"):
        rules = {"whitespace_pattern": _WHITESPACE}
        return str(guidance.LLMatcher.grammar_from_json_schema(text, overrides=rules))
    if kind == "choice":
        text = "|".join(f"({_escaped(choice)})" for choice in json.loads(text))
    return str(guidance.grammar_from("grammar" if kind == "grammar" else "regex", text))


def _escaped(text: str) -> str:
    """A regular expression for ``text`` itself."""
    return "".join(f"\\{c}" if c in r"\.+*?()|[]{}^$#&-~" else c for c in text)


def _without_padding(state: str) -> str:
    """tokenizer.json's text with truncation and padding off: they are not the vocabulary's."""
    value = json.loads(state)
    value["truncation"] = value["padding"] = None
    return json.dumps(value, ensure_ascii=False)


def _complaint(kind: str, reason: str) -> str:
    if reason.startswith("NoExtension"):
        reason = "no text has this form"
    return f"structured_outputs: this {kind} cannot be used: {_first_line(reason)}"


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[0] if lines else "no reason given")[:300]
