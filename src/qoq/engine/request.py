"""What is asked (SamplingParams), a prompt on its way (Request) and the answer (Output).

No tensors: which token comes next is the engine's matter, what it means for a request is decided
here.
"""

import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qoq.errors import RequestError
from qoq.tokenizer import Detokenizer, StopMatcher, Tokenizer

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop. Bad values raise RequestError.

    max_tokens: new tokens at most (the model's context may end a text sooner).
    temperature: 0 takes the likeliest token (greedy); top_k: 0 is off; top_p: 1 is off; min_p: 0 is
    off, else tokens less likely than ``min_p`` times the likeliest are left out.
    seed: the same one gives the same text again; None draws a fresh one for each request.
    stop: a string or several; the text ends before the first that appears.
    stop_token_ids: end the text like the model's own end-of-sequence ids, which ``ignore_eos``
    switches off.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _require(_is_int(self.max_tokens) and self.max_tokens >= 1, self, "max_tokens", "1 or more")
        _require(_within(self.temperature, 0, math.inf), self, "temperature", "0 or more")
        _require(_is_int(self.top_k) and self.top_k >= 0, self, "top_k", "0 (off) or more")
        in_p = _within(self.top_p, 0, 1) and self.top_p > 0
        _require(in_p, self, "top_p", "above 0 and at most 1")
        _require(_within(self.min_p, 0, 1), self, "min_p", "from 0 to 1")
        seeded = self.seed is None or (_is_int(self.seed) and 0 <= self.seed < 2**63)
        _require(seeded, self, "seed", "None or from 0 to 2**63 - 1")
        strings = _is_sequence(self.stop) and all(isinstance(s, str) and s for s in self.stop)
        stops = (isinstance(self.stop, str) and self.stop != "") or strings
        _require(stops, self, "stop", "a string or a list of strings, none of them empty")
        ids = _is_sequence(self.stop_token_ids) and all(
            _is_int(i) and i >= 0 for i in self.stop_token_ids
        )
        _require(ids, self, "stop_token_ids", "a list of token ids")
        _require(isinstance(self.ignore_eos, bool), self, "ignore_eos", "True or False")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


def _require(good: bool, params: SamplingParams, name: str, wanted: str) -> None:
    if not good:
        raise RequestError(f"{name} must be {wanted}, not {getattr(params, name)!r}.")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _within(value: object, low: float, high: float) -> bool:
    """A finite number (no bool) in low..high."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and low <= value <= high  # type: ignore[arg-type,operator]


def _is_sequence(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


@dataclass(frozen=True)
class Output:
    """A finished text.

    text continues the prompt; token_ids are the new ids, a final end-of-sequence id included, and
    logprobs their log-probabilities under the model (before temperature and cuts).
    finish_reason: "stop" (end of sequence or stop string), "length" or "abort".
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    prompt_token_ids: list[int]


@dataclass(frozen=True)
class Update:
    """What one step gave one request; ``text`` may be "" while a character is incomplete."""

    request: "Request"
    token_id: int
    text: str


class Request:
    """A prompt and what has been generated so far.

    ``ids`` are prompt and new ids together; ``num_cached`` of them have their keys and values in
    ``pages``. ``finish_reason`` is None until the text has ended. ``num_cached_prompt_tokens`` of
    the prompt were in the prefix cache when the request was first let in. ``arrival_time``,
    ``admitted_at`` (its first step), ``first_token_time`` and ``finish_time`` are seconds of
    ``time.monotonic()`` (None: not yet).
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        max_length: int,
        eos_ids: Sequence[int] = (),
        tokenizer: Tokenizer | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> None:
        """max_length bounds prompt and new tokens together; without a tokenizer ``text`` stays "".

        Lower ``priority`` is served first; only requests of the same ``cache_salt`` share cached
        prefixes. Raises RequestError for stop strings without a tokenizer.
        """
        if params.stop_strings and tokenizer is None:
            raise RequestError("Stop strings need a tokenizer; this model came without one.")
        self.prompt_ids = list(prompt_ids)
        self.params = params
        self.max_length = max_length
        self.priority = priority
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self.ids = list(prompt_ids)
        self.logprobs: list[float] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.num_cached_prompt_tokens = 0
        self.num_preemptions = 0
        self.arrival_time = time.monotonic()
        self.admitted_at: float | None = None
        self.first_token_time: float | None = None
        self.finish_time: float | None = None
        self._ends = {*params.stop_token_ids, *(() if params.ignore_eos else eos_ids)}
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer, prompt_ids)
        self._matcher = StopMatcher(params.stop_strings)
        # The scheduler's: where it stands in line, its place among those that run (-1: none), its
        # pages, how much of it they hold, and the names of its full pages.
        self.cache_salt = cache_salt
        self.order = (priority, -1)
        self.row = -1
        self.pages: list[int] = []
        self.num_cached = 0
        self.keys: list[bytes] = []
        self.num_named = 0

    @property
    def token_ids(self) -> list[int]:
        """The new ids."""
        return self.ids[len(self.prompt_ids) :]

    @property
    def num_new(self) -> int:
        """How many new ids there are; the counter that sampling's randomness hangs on."""
        return len(self.ids) - len(self.prompt_ids)

    def accept(self, token_id: int, logprob: float) -> Update:
        """Take the next id; sets ``finish_reason`` when the text ends with it."""
        self.ids.append(token_id)
        self.logprobs.append(logprob)
        piece = ""
        if token_id in self._ends:
            self.finish_reason = "stop"  # and the id that says so is not part of the text
        elif self._detokenizer is not None:
            piece = self._matcher.push(self._detokenizer.push(token_id))
        if len(self.ids) >= self.max_length and self.finish_reason is None:
            self.finish_reason = "length"
        if self.finish_reason is not None and self._detokenizer is not None:
            piece += self._matcher.push(self._detokenizer.flush()) + self._matcher.flush()
        if self._matcher.matched:
            self.finish_reason = "stop"
        self.text += piece
        return Update(self, token_id, piece)

    def output(self) -> Output:
        """The answer; a request that was not finished counts as aborted."""
        reason = self.finish_reason or "abort"
        return Output(self.text, self.token_ids, list(self.logprobs), reason, self.prompt_ids)
