"""Structured output: which tokens keep a text on the way to the form that was asked for.

What compiles a structure (``grammar``) may loop or eat memory on hostile ones, so each is tried out
in a child process first (``grammar_child``) and compiled here only where that went well.
"""

import threading
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from qoq.child import Child
from qoq.engine.grammar import Compiler, Vocabulary, first_line
from qoq.engine.structured_params import StructuredOutputsParams
from qoq.errors import RequestError
from qoq.tokenizer import Tokenizer

CACHED_GRAMMARS = 128
CACHED_BYTES = 256 << 20
_BACKSTOP_S = 120.0  # for a trial; the child itself ends it after seconds of processor time


@dataclass(eq=False)
class Compiled:
    """A structure ready to be followed; it is found again for as long as someone holds it."""

    matcher: Any
    nbytes: int


class Grammars:
    """Compiles structures for one vocabulary and remembers the latest. Safe to share by threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        *,
        cached: int = CACHED_GRAMMARS,
        cached_bytes: int = CACHED_BYTES,
    ) -> None:
        """vocab_size: the length of a row of logits. Structures are remembered as far as ``cached``
        and ``cached_bytes`` go. Raises RequestError without llguidance.
        """
        self._vocab_size = vocab_size
        self._eos_ids = tokenizer.eos_ids
        self._cached, self._cached_bytes = cached, cached_bytes
        vocabulary = Vocabulary.of(tokenizer, vocab_size)
        self._compiler = Compiler(vocabulary)
        self._child = Child("qoq.engine.grammar_child", vocabulary.to_json)
        self._alive: WeakValueDictionary[tuple[str, str], Compiled] = WeakValueDictionary()
        self._latest: OrderedDict[tuple[str, str], Compiled] = OrderedDict()
        self._lock = threading.Lock()
        self._compiling = threading.Lock()  # one at a time; what many ask at once is compiled once

    def compile(self, structure: StructuredOutputsParams) -> Compiled:
        """Have a structure ready for ``matcher``; takes seconds at worst, so not on a hot path.

        Raises RequestError for one that is wrong, not supported or too large.
        """
        found = self.find(structure)
        if found is None:
            with self._compiling:
                found = self.find(structure) or self._compile(*structure.spec())
        return found

    def find(self, structure: StructuredOutputsParams) -> Compiled | None:
        """What ``compile`` gave for it, if that is remembered or still held by someone."""
        spec = structure.spec()
        with self._lock:
            found = self._alive.get(spec)
            if found is not None:
                self._remember(spec, found)
            return found

    def matcher(
        self, structure: StructuredOutputsParams, end_ids: Collection[int] = ()
    ) -> "StructureMatcher":
        """A matcher at its beginning; ``end_ids`` may end the text once its form is complete.

        Raises what ``compile`` raises.
        """
        compiled = self.compile(structure)
        copy = compiled.matcher.deep_copy()
        return StructureMatcher(copy, self._eos_ids, end_ids, self._vocab_size)

    def close(self) -> None:
        """End the child process; the next structure that is new starts another."""
        self._child.close()

    def _compile(self, kind: str, text: str) -> Compiled:
        tried = self._child.ask({"kind": kind, "text": text}, _BACKSTOP_S)
        if tried is not None and "error" in tried:
            raise RequestError(str(tried["error"]))
        if tried is None or "bytes" not in tried:
            raise RequestError(
                f"structured_outputs: this {kind} cannot be used: it takes too long or too much "
                "memory to compile. Make it smaller or simpler."
            )
        compiled = Compiled(self._compiler.compile(kind, text), int(tried["bytes"]))
        with self._lock:
            self._alive[kind, text] = compiled
            self._remember((kind, text), compiled)
        return compiled

    def _remember(self, spec: tuple[str, str], compiled: Compiled) -> None:
        self._latest[spec] = compiled
        self._latest.move_to_end(spec)
        while len(self._latest) > self._cached or (
            sum(each.nbytes for each in self._latest.values()) > self._cached_bytes
        ):
            self._latest.popitem(last=False)


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
            reason = first_line(self._matcher.get_error())
            self.error = f"structured_outputs cannot be followed any further: {reason}"
