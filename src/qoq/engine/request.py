"""What is asked (SamplingParams), a prompt on its way (Request) and the answer (Output).

No tensors: which token comes next is the engine's matter, what it means for a request is decided
here.
"""

import math
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from qoq.engine.checks import check_rules, is_ids, is_int, is_sequence, require, within
from qoq.engine.structured_params import StructuredOutputsParams
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
    switches off; min_tokens: no end of any kind before so many new tokens.
    repetition_penalty: what the prompt or the text already holds gets its logit divided by this if
    it is positive, else multiplied (1 is off); frequency_penalty and presence_penalty: taken off
    the logits of what the text holds, for each time and once (0 is off).
    logit_bias: token id to what is added to its logit, -100 to 100. allowed_token_ids: no others
    are chosen. bad_words: strings that are not written, as far as their usual tokens go.
    structured_outputs: the form that the text must have.
    logprobs: also give the log-probabilities of so many likeliest tokens at each place (0: of the
    chosen one with its rank only; None: none of this); prompt_logprobs: the same at each place of
    the prompt, which then is read in full, no cached prefix used.
    n: texts wanted (see ``engine.choices``). skip_special_tokens: leave them out of the text, all
    but shown_special_ids. include_stop_str_in_output: the text ends with what stopped it.
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
    min_tokens: int = 0
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    structured_outputs: StructuredOutputsParams | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    shown_special_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        require(is_int(self.max_tokens) and self.max_tokens >= 1, self, "max_tokens", "1 or more")
        require(within(self.temperature, 0, math.inf), self, "temperature", "0 or more")
        require(is_int(self.top_k) and self.top_k >= 0, self, "top_k", "0 (off) or more")
        in_p = within(self.top_p, 0, 1) and self.top_p > 0
        require(in_p, self, "top_p", "above 0 and at most 1")
        require(within(self.min_p, 0, 1), self, "min_p", "from 0 to 1")
        seeded = self.seed is None or (is_int(self.seed) and 0 <= self.seed < 2**63)
        require(seeded, self, "seed", "None or from 0 to 2**63 - 1")
        strings = is_sequence(self.stop) and all(isinstance(s, str) and s for s in self.stop)
        stops = (isinstance(self.stop, str) and self.stop != "") or strings
        require(stops, self, "stop", "a string or a list of strings, none of them empty")
        require(is_ids(self.stop_token_ids), self, "stop_token_ids", "a list of token ids")
        require(isinstance(self.ignore_eos, bool), self, "ignore_eos", "True or False")
        check_rules(self)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @cached_property
    def shapes_logits(self) -> bool:
        """Whether anything but temperature and cuts decides which token is drawn."""
        return (
            self.follows_text
            or self.min_tokens > 0
            or bool(self.logit_bias)
            or self.allowed_token_ids is not None
        )

    @cached_property
    def follows_text(self) -> bool:
        """Whether a rule on logits hangs on the tokens that are there already."""
        return self.penalizes or len(self.bad_words) > 0 or self.structured_outputs is not None

    @property
    def penalizes(self) -> bool:
        """Whether what is there already makes its tokens more or less likely."""
        return self.repetition_penalty != 1 or any((self.presence_penalty, self.frequency_penalty))


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability under the model and its place in the ranking, 1 the likeliest."""

    logprob: float
    rank: int


@dataclass(frozen=True)
class Output:
    """A finished text.

    text continues the prompt; token_ids are the new ids, a final end-of-sequence id included, and
    logprobs their log-probabilities under the model (before penalties, temperature and cuts).
    finish_reason: "stop" (end of sequence, stop string or end of the structure), "length" or
    "abort"; stop_reason: the stop string or the id of ``stop_token_ids`` that ended it, if one did;
    error: what went wrong where the request ended by an error of its own.
    index: which of a prompt's ``n`` texts this is.
    top_logprobs: for each new id, itself first and then the likeliest, as SamplingParams.logprobs
    asked; prompt_logprobs likewise for the prompt's ids, None for the first.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    prompt_token_ids: list[int]
    index: int = 0
    stop_reason: int | str | None = None
    top_logprobs: list[dict[int, Logprob]] | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    error: str | None = None

    @property
    def cumulative_logprob(self) -> float:
        """Log-probability of all new ids together."""
        return math.fsum(self.logprobs)


@dataclass(frozen=True)
class Update:
    """What one step gave one request: new ids, and the text they made certain ("" while a character
    is incomplete). Logprobs are the request's last, as many as there are ids.

    Several ids where guesses were right; none where the request ended by an error of its own.
    """

    request: "Request"
    token_ids: tuple[int, ...]
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
        self.index = 0
        self.finish_reason: FinishReason | None = None
        self.num_cached_prompt_tokens = 0
        self.num_preemptions = 0
        self.arrival_time = time.monotonic()
        self.admitted_at: float | None = None
        self.first_token_time: float | None = None
        self.finish_time: float | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self.top_logprobs: list[dict[int, Logprob]] = []
        self.prompt_logprobs: list[dict[int, Logprob] | None] = []
        self.end_ids = frozenset({*params.stop_token_ids, *(() if params.ignore_eos else eos_ids)})
        self._detokenizer = None
        if tokenizer is not None:
            self._detokenizer = Detokenizer(
                tokenizer,
                prompt_ids,
                skip_special=params.skip_special_tokens,
                shown=params.shown_special_ids,
            )
        self._matcher = StopMatcher(params.stop_strings, include=params.include_stop_str_in_output)
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

    @property
    def guessable(self) -> bool:
        """Whether tokens after the next can be drawn before it is known, given their logits."""
        return not self.params.follows_text and self.num_new >= self.params.min_tokens

    def accept(
        self,
        token_id: int,
        logprob: float,
        top_logprobs: dict[int, Logprob] | None = None,
        *,
        last: bool = False,
    ) -> str:
        """Take the next id and return the text it makes certain; sets ``finish_reason`` when the
        text ends with it.

        ``last``: the structure that was asked for is complete with it.
        """
        self.ids.append(token_id)
        self.logprobs.append(logprob)
        if top_logprobs is not None:
            self.top_logprobs.append(top_logprobs)
        piece = ""
        ends = token_id in self.end_ids
        if ends:
            self.finish_reason = "stop"
            self.stop_reason = token_id if token_id in self.params.stop_token_ids else None
        in_text = not ends or self.params.include_stop_str_in_output
        if in_text and self._detokenizer is not None:
            piece = self._detokenizer.push(token_id)
            if self.num_new > self.params.min_tokens:
                piece = self._matcher.push(piece)
        if last and self.finish_reason is None:
            self.finish_reason = "stop"
        if len(self.ids) >= self.max_length and self.finish_reason is None:
            self.finish_reason = "length"
        if self.finish_reason is not None and self._detokenizer is not None:
            piece += self._matcher.push(self._detokenizer.flush()) + self._matcher.flush()
        if self._matcher.matched:
            self.finish_reason, self.stop_reason = "stop", self._matcher.found
        self.text += piece
        return piece

    def fail(self, message: str) -> str:
        """End by an error that is this request's alone and return what text was held back;
        ``message`` says what happened.
        """
        self.finish_reason, self.error = "abort", message
        piece = ""
        if self._detokenizer is not None:
            piece = self._matcher.push(self._detokenizer.flush()) + self._matcher.flush()
        self.text += piece
        return piece

    def output(self) -> Output:
        """The answer; a request that was not finished counts as aborted."""
        params = self.params
        return Output(
            self.text,
            self.token_ids,
            list(self.logprobs),
            self.finish_reason or "abort",
            self.prompt_ids,
            index=self.index,
            stop_reason=self.stop_reason,
            top_logprobs=None if params.logprobs is None else list(self.top_logprobs),
            prompt_logprobs=None if params.prompt_logprobs is None else list(self.prompt_logprobs),
            error=self.error,
        )
