"""A load test's client: requests sent when they are due, answers timed as they stream in."""

import asyncio
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2

from qoq.bench.prompts import Ask
from qoq.client.api import CHAT, Endpoint, stream_async, timeouts
from qoq.errors import RequestError, ServerError


@dataclass(frozen=True)
class Ramp:
    """A request rate that grows from the first request to the last, in arrivals per second.

    exponential: by the same factor from each to the next, else by the same amount.
    """

    start: float
    end: float
    exponential: bool = False

    def rate(self, share: float) -> float:
        """The rate after this share of the requests, 0 to 1."""
        if self.exponential:
            return float(self.start * (self.end / self.start) ** share)
        return self.start + (self.end - self.start) * share


@dataclass(frozen=True)
class Load:
    """Whom to ask and how.

    path: the route; extra: fields of every request's body; request_rate: arrivals per second, inf
    for all at once, or a rate that grows; burstiness: 1 is a Poisson process, less comes in bursts,
    more is steadier; max_concurrency: requests in flight at most (None: any number); timeout:
    seconds of silence after which a request counts as failed.
    """

    endpoint: Endpoint
    model: str
    path: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    request_rate: float | Ramp = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None
    timeout: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Sample:
    """What became of one request; seconds, counted from when it was sent.

    start: since the run began; late: after it was due; ttft: to its first text; gaps: between
    pieces of text after that; e2el: to its end. failure: None, or the kind of it.
    """

    start: float
    late: float
    e2el: float
    ttft: float = 0.0
    gaps: tuple[float, ...] = ()
    input_tokens: int = 0
    output_tokens: int = 0
    failure: str | None = None
    message: str = ""

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first; None for an answer of one token."""
        return (
            (self.e2el - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None
        )


def arrivals(count: int, request_rate: float | Ramp, burstiness: float, seed: int) -> list[float]:
    """Seconds after the start at which each request is due; the first at once."""
    ramp = request_rate if isinstance(request_rate, Ramp) else Ramp(request_rate, request_rate)
    if not ramp.start > 0 or not ramp.end > 0 or not burstiness > 0:
        raise RequestError("--request-rate and --burstiness must be above 0.")
    if math.isinf(ramp.start) or math.isinf(ramp.end):
        return [0.0] * count
    draw = random.Random(seed)
    times, at = [], 0.0
    for i in range(count):
        times.append(at)
        at += draw.gammavariate(burstiness, 1 / (ramp.rate(i / count) * burstiness))
    return times


async def run_load(
    load: Load, asks: Sequence[Ask], done: Callable[[int], None] = lambda count: None
) -> list[Sample]:
    """Send every request and wait for all of them; ``done`` is told how many have ended.

    Arrivals do not wait for answers (an open loop) unless ``max_concurrency`` holds them back.
    """
    due = arrivals(len(asks), load.request_rate, load.burstiness, load.seed)
    limit = asyncio.Semaphore(load.max_concurrency or max(1, len(asks)))
    ended = 0
    async with _client(load) as client:
        begun = time.perf_counter()

        async def one(ask: Ask, at: float) -> Sample:
            nonlocal ended
            await asyncio.sleep(max(0.0, begun + at - time.perf_counter()))
            async with limit:
                sample = await _ask(client, load, ask, begun, at)
            ended += 1
            done(ended)
            return sample

        return await asyncio.gather(*(one(ask, at) for ask, at in zip(asks, due, strict=True)))


async def check(load: Load, ask: Ask) -> None:
    """One request ahead of the test. Raises ServerError if it fails."""
    async with _client(load) as client:
        sample = await _ask(client, load, ask, time.perf_counter(), 0.0)
    if sample.failure is not None:
        raise ServerError(f"The first request failed. {sample.message}", sample.failure)


def _client(load: Load) -> httpx2.AsyncClient:
    unlimited = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx2.AsyncClient(timeout=timeouts(load.timeout), limits=unlimited)


async def _ask(
    client: httpx2.AsyncClient, load: Load, ask: Ask, begun: float, due: float
) -> Sample:
    """Send one request and follow its answer to the end."""
    sent = last = time.perf_counter()
    ttft: float | None = None
    gaps: list[float] = []
    input_tokens = output_tokens = pieces = 0
    failure, message = None, ""
    try:
        async for piece in stream_async(client, load.endpoint, load.path, _body(load, ask)):
            if piece.text:
                now = time.perf_counter()
                pieces += 1
                if ttft is None:
                    ttft = now - sent
                else:
                    gaps.append(now - last)
                last = now
            if piece.finish_reason is not None:
                # A last token without text of its own (an end of sequence) still took its time.
                last = time.perf_counter()
            input_tokens = piece.prompt_tokens or input_tokens
            output_tokens = piece.completion_tokens or output_tokens
    except ServerError as error:
        failure, message, last = error.kind, str(error), time.perf_counter()
    e2el = last - sent
    return Sample(
        start=sent - begun,
        late=max(0.0, sent - begun - due),
        e2el=e2el,
        ttft=e2el if ttft is None else ttft,
        gaps=tuple(gaps),
        input_tokens=input_tokens,
        output_tokens=output_tokens or pieces,
        failure=failure,
        message=message,
    )


def _body(load: Load, ask: Ask) -> dict[str, Any]:
    body: dict[str, Any] = {"model": load.model, "max_tokens": ask.max_tokens, **load.extra}
    if load.path.endswith(CHAT.removeprefix("/v1")):
        said = ask.messages or [{"role": "user", "content": ask.prompt}]
        return {**body, "messages": list(said)}
    return {**body, "prompt": ask.prompt}
