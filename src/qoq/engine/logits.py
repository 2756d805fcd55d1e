"""What requests want done to their logits before a token is drawn, for a whole batch at a time.

Order, in each row: allowed_token_ids, bad_words and min_tokens forbid; logit_bias adds; penalties;
structured output forbids. Where that leaves no id at all, only the hard rule counts: the structure,
else allowed_token_ids, else none. Every rule works on its own row, so nothing hangs on the batch.
"""

import threading
from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from qoq.engine.checks import check_vocabulary
from qoq.engine.penalties import Tally, penalize
from qoq.engine.request import Request
from qoq.engine.structured import Grammars, StructureMatcher
from qoq.errors import RequestError
from qoq.tokenizer import Tokenizer


class LogitsRules:
    """The rules of an engine's requests, with what each has seen so far.

    A request's state is made when it is first met, or by ``admit``, and goes with the request,
    which it must therefore never hold.
    Requests whose ``params.shapes_logits`` is False have none and need not be given to ``apply``.
    """

    def __init__(self, vocab_size: int, tokenizer: Tokenizer | None = None) -> None:
        self._vocab_size = vocab_size
        self._tokenizer = tokenizer
        self._grammars: Grammars | None = None
        self._making = threading.Lock()
        self._states: WeakKeyDictionary[Request, _Rules] = WeakKeyDictionary()

    def admit(self, request: Request, device: torch.device) -> None:
        """Make a request's state now; RequestError where its rules cannot be followed."""
        params = request.params
        if not params.shapes_logits or request in self._states:
            return
        check_vocabulary(params, self._vocab_size)
        if params.bad_words and self._tokenizer is None:
            raise RequestError("bad_words need a tokenizer; this model came without one.")
        words = _spellings(params.bad_words, self._tokenizer) if self._tokenizer else []
        matcher = None
        if params.structured_outputs is not None:
            matcher = self.grammars.matcher(params.structured_outputs, request.end_ids)
        self._states[request] = _Rules(request, words, matcher, device)

    def apply(self, logits: Tensor, rows: Sequence[int], requests: Sequence[Request]) -> None:
        """Change ``rows`` of logits fp32 [S, V] in place as their requests want it."""
        pairs = []
        forbidden = {}
        tallies = {}
        for row, request in zip(rows, requests, strict=True):
            if request.params.shapes_logits:
                self.admit(request, logits.device)
                state = self._states[request]
                pairs.append((row, state))
                forbidden[row] = state.forbidden(request)
                if state.tally is not None:
                    state.tally.catch_up(request)
                    tallies[row] = state.tally
        raw = {row: logits[row].clone() for row, ids in forbidden.items() if ids}
        for row, state in pairs:
            state.only_allowed(logits[row])
        _forbid(logits, forbidden)
        for row, state in pairs:
            state.add_bias(logits[row])
        if tallies:
            penalize(logits, list(tallies), list(tallies.values()))
        for row, state in pairs:
            state.follow(logits[row])
            if row in raw and bool(logits[row].max() == -torch.inf):
                logits[row] = raw[row]
                state.only_allowed(logits[row])
                state.follow(logits[row])

    def error(self, request: Request) -> str | None:
        """What keeps a request from going on: a structure that grew too large to follow."""
        state = self._states.get(request)
        return None if state is None or state.matcher is None else state.matcher.error

    def advance(self, request: Request, token_id: int) -> bool:
        """Tell the structure what was drawn; True where the text is complete with it."""
        state = self._states.get(request)
        if state is None or state.matcher is None or token_id in request.end_ids:
            return False
        return state.matcher.accept(token_id)

    @property
    def grammars(self) -> Grammars:
        """What compiles structures, made at first use; for any thread."""
        with self._making:
            if self._grammars is None:
                if self._tokenizer is None:
                    raise RequestError("structured_outputs needs a tokenizer; this model has none.")
                self._grammars = Grammars(self._tokenizer, self._vocab_size)
            return self._grammars


class _Rules:
    """One request's rules, as tensors that are made once."""

    def __init__(
        self,
        request: Request,
        words: list[tuple[int, ...]],
        matcher: StructureMatcher | None,
        device: torch.device,
    ) -> None:
        params = request.params
        bias = params.logit_bias or {}
        self.matcher = matcher
        self.tally = Tally(request, device) if params.penalizes else None
        self._bias_ids = torch.tensor(list(bias), dtype=torch.int64, device=device)
        self._bias = torch.tensor(list(bias.values()), dtype=torch.float32, device=device)
        self._words = words
        self._allowed = None
        if params.allowed_token_ids is not None:
            ids = sorted(set(params.allowed_token_ids))
            self._allowed = torch.tensor(ids, dtype=torch.int64, device=device)

    def only_allowed(self, row: Tensor) -> None:
        """Forbid all but allowed_token_ids in the row [V], in place."""
        if self._allowed is not None:
            kept = row[self._allowed]
            row.fill_(-torch.inf)
            row[self._allowed] = kept

    def add_bias(self, row: Tensor) -> None:
        """Add logit_bias to the row [V], in place."""
        if self._bias_ids.shape[0]:
            row[self._bias_ids] += self._bias

    def follow(self, row: Tensor) -> None:
        """Forbid what the structure does not allow in the row [V], in place."""
        if self.matcher is not None:
            self.matcher.mask(row)

    def forbidden(self, request: Request) -> list[int]:
        """Ids that must not come next: ends that come too early, last ids of bad words."""
        early = request.num_new < request.params.min_tokens
        out = list(request.end_ids) if early else []
        for *before, last in self._words:
            count = len(before)
            if count <= request.num_new and request.ids[len(request.ids) - count :] == before:
                out.append(last)
        return out


def _forbid(logits: Tensor, forbidden: Mapping[int, Sequence[int]]) -> None:
    vocab = logits.shape[1]
    found = [(row, i) for row, ids in forbidden.items() for i in ids if i < vocab]
    if found:
        at, ids = torch.tensor(found, dtype=torch.int64, device=logits.device).unbind(1)
        logits[at, ids] = -torch.inf


def _spellings(words: Sequence[str], tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """The ids of each word as it is written at the start of a text and after a space."""
    texts = [text for word in words for text in (word.lstrip(), " " + word.lstrip())]
    found = (tuple(tokenizer.encode(text, special=False)) for text in texts)
    return [ids for ids in dict.fromkeys(found) if ids]
