"""Generation: what one HTTP request asked of the engine, as a stream on the asyncio side."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from qoq.engine.request import FinishReason, Logprob, Request, SamplingParams
from qoq.server.errors import timed_out


@dataclass(frozen=True)
class Delta:
    """What is new of one text: ids, their logprobs and the text they made certain.

    ``likeliest`` and ``prompt`` are there where they were asked for: for each new id, and with the
    first for each of the prompt's (None for its first), itself and the likeliest at its place.

    ``finish_reason`` is None until the last one, ``stop_reason`` the stop string or id that ended
    the text, if one did; ``cached_tokens`` of the prompt were found in the prefix cache.
    ``admitted_at`` and ``at`` are time.monotonic() of admission and of the step.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    likeliest: tuple[dict[int, Logprob], ...] = ()
    prompt: tuple[dict[int, Logprob] | None, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    cached_tokens: int = 0
    admitted_at: float | None = None
    at: float = 0.0

    @classmethod
    def joined(cls, deltas: Sequence["Delta"]) -> "Delta":
        """All of them in one; what is no sequence is that of the last."""
        if not deltas:
            return cls()
        return replace(
            deltas[-1],
            text="".join(delta.text for delta in deltas),
            token_ids=tuple(i for delta in deltas for i in delta.token_ids),
            logprobs=tuple(p for delta in deltas for p in delta.logprobs),
            likeliest=tuple(top for delta in deltas for top in delta.likeliest),
            prompt=tuple(top for delta in deltas for top in delta.prompt),
        )


@dataclass(eq=False)
class Ticket:
    """One text on its way. ``request`` and ``seen`` belong to the engine's thread alone."""

    prompt_ids: Sequence[int]
    params: SamplingParams
    generation: "Generation"
    index: int
    priority: int = 0
    salt: str = ""
    arrived_at: float = field(default_factory=time.monotonic)
    first_token_at: float | None = None
    last_token_at: float = 0.0
    num_tokens: int = 0
    accepted: bool = False
    open: bool = True  # not yet ended, as the event loop sees it
    request: Request | None = None
    seen: int = 0


class Generation:
    """The texts that one HTTP request asked for; iterate for (index of the text, Delta).

    Lives on the event loop alone. What arrives while nobody reads is joined, so a slow reader gets
    one Delta per text. Leave it by its end or by ``abort``; both free what the engine holds.
    """

    def __init__(
        self,
        prompts: Sequence[tuple[Sequence[int], SamplingParams]],
        *,
        give_up: Callable[["Ticket"], None],
        time_limit: float | None = None,
        priority: int = 0,
        salt: str = "",
    ) -> None:
        """``give_up`` is called for each open ticket on abort; ``time_limit`` is in seconds."""
        self.tickets = [
            Ticket(ids, params, self, i, priority, salt) for i, (ids, params) in enumerate(prompts)
        ]
        self._give_up = give_up
        self._time_limit = time_limit
        self._deadline = None if time_limit is None else time.monotonic() + time_limit
        self._pending: dict[int, list[Delta]] = {}
        self._failure: Exception | None = None
        self._news = asyncio.Event()

    async def accepted(self) -> None:
        """Wait until the engine has taken every text; raises what it says against one."""
        while not all(ticket.accepted for ticket in self.tickets):
            await self._wait()

    def __aiter__(self) -> "Generation":
        return self

    async def __anext__(self) -> tuple[int, Delta]:
        while not self._pending:
            if self._failure is None and not any(ticket.open for ticket in self.tickets):
                raise StopAsyncIteration
            await self._wait()
        index = next(iter(self._pending))
        return index, Delta.joined(self._pending.pop(index))

    async def answers(self) -> list[Delta]:
        """Every text whole, in order."""
        parts: list[list[Delta]] = [[] for _ in self.tickets]
        async for index, delta in self:
            parts[index].append(delta)
        return [Delta.joined(deltas) for deltas in parts]

    def abort(self) -> None:
        """Have the engine drop what is still open; harmless at the end."""
        for ticket in self.tickets:
            if ticket.open:
                self._give_up(ticket)

    def push(self, index: int, delta: Delta) -> None:
        """Called by the engine's side, on the event loop."""
        self._pending.setdefault(index, []).append(delta)
        self._news.set()

    def fail(self, error: Exception) -> None:
        """The reader gets ``error`` instead of more."""
        self._failure = self._failure or error
        self._news.set()

    def wake(self) -> None:
        """Let the reader look again: a ticket has changed."""
        self._news.set()

    async def _wait(self) -> None:
        """Until something has changed; raises the failure, or a 408 after the time limit."""
        if self._failure is not None:
            raise self._failure
        try:
            async with asyncio.timeout(self._left()):
                await self._news.wait()
        except TimeoutError:
            self.abort()
            raise timed_out(self._time_limit or 0.0) from None
        self._news.clear()
        if self._failure is not None:
            raise self._failure

    def _left(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
