"""Structures compiled by llguidance, within limits; without torch, so that a child starts quickly.

Grammars are llguidance's: they are followed token by token instead of being expanded beforehand,
and every phase has a budget, so that most of what explodes is cut off with an error. Its converters
have none, and some schemas of fifty bytes keep them busy for minutes and gigabytes: see
``grammar_child``.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from qoq.engine import structural_tag
from qoq.errors import RequestError

MAX_SPEC_BYTES = 256 << 10
# Budgets in llguidance's units; what each takes at most on one core: half a second or so to build
# and 50 MB to keep, some ten milliseconds for a mask.
LIMITS = {
    "max_grammar_size": 100_000,
    "initial_lexer_fuel": 300_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_items_in_row": 2_000,
    "max_lexer_states": 50_000,
}
# Between two marks of JSON. Without a bound, a small model may write spaces for ever.
_WHITESPACE = r"[ \t\r\n]{1,40}"


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that grammars are compiled for: tokenizer.json's text, the number of ids (at least
    the tokenizer's), those that end a text.
    """

    state: str
    size: int
    eos_ids: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any, vocab_size: int) -> Self:
        """Of a ``qoq.tokenizer.Tokenizer``; RequestError for one without a tokenizer.json."""
        backend = getattr(tokenizer.hf, "backend_tokenizer", None)
        if backend is None:
            raise RequestError("structured_outputs needs a tokenizer.json; this model has none.")
        state = json.loads(backend.to_str())
        state["truncation"] = state["padding"] = None  # they are not the vocabulary's
        size = max(vocab_size, len(tokenizer))
        return cls(json.dumps(state, ensure_ascii=False), size, tokenizer.eos_ids)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """What ``to_json`` gave."""
        return cls(value["state"], value["size"], tuple(value["eos_ids"]))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Compiler:
    """Compiles structures for one vocabulary."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Raises RequestError without llguidance."""
        self._guidance = _llguidance()
        self._tokenizer = self._guidance.LLTokenizer(
            vocabulary.state, n_vocab=vocabulary.size, eos_token=list(vocabulary.eos_ids) or None
        )
        added = json.loads(vocabulary.state)["added_tokens"]
        special = [token for token in added if self._tokenizer.is_special_token(token["id"])]
        self._special = {token["content"]: token["id"] for token in special}
        # What llguidance takes for special by its looks, and the tokenizer for text (<think>).
        self._free = [token["id"] for token in special if not token["special"]]

    def compile(self, kind: str, text: str) -> Any:
        """An LLMatcher at its beginning, for ``StructuredOutputsParams.spec``'s kind and text.

        Raises RequestError for what is wrong, not supported or too large.
        """
        size = len(text.encode())
        if size > MAX_SPEC_BYTES:
            raise RequestError(
                f"structured_outputs: the {kind} has {size} bytes; at most {MAX_SPEC_BYTES} are "
                "compiled. Make it smaller."
            )
        try:
            grammar = self._grammar(kind, text)
        except Exception as error:  # its converters raise what they like
            raise RequestError(_complaint(kind, str(error))) from error
        limits = self._guidance.LLParserLimits(**LIMITS, verbose_errors=False)
        matcher = self._guidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        trial = matcher.deep_copy()
        if not trial.is_error():
            trial.compute_bitmask()  # what is too large or fits no text often shows at once
        if trial.is_error():
            raise RequestError(_complaint(kind, trial.get_error()))
        return matcher

    def _grammar(self, kind: str, text: str) -> str:
        """A structure in llguidance's own notation."""
        if kind == "structural_tag":
            return structural_tag.lark(json.loads(text), self._special, self._free, _WHITESPACE)
        if kind in ("json", "json_object"):
            rules = {"whitespace_pattern": _WHITESPACE}
            return str(self._guidance.LLMatcher.grammar_from_json_schema(text, overrides=rules))
        if kind == "choice":
            text = "|".join(f"({_escaped(choice)})" for choice in json.loads(text))
        return str(self._guidance.grammar_from("grammar" if kind == "grammar" else "regex", text))


def first_line(text: str) -> str:
    """The first line of an error that may have many."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[0] if lines else "no reason given")[:300]


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise RequestError(
            "structured_outputs needs the package llguidance; install it with "
            "`pip install llguidance`."
        ) from error
    return llguidance


def _escaped(text: str) -> str:
    """A regular expression for ``text`` itself."""
    return "".join(f"\\{c}" if c in r"\.+*?()|[]{}^$#&-~" else c for c in text)


def _complaint(kind: str, reason: str) -> str:
    if reason.startswith("NoExtension"):
        reason = "no text has this form"
    return f"structured_outputs: this {kind} cannot be used: {first_line(reason)}"
