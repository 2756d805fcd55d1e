"""AsyncEngine: the engine on a thread of its own, asyncio on the other side.

One lock discipline. The ``Engine`` and its Requests are touched by the engine thread only, metrics
and the public side of tickets by the event loop only. Between them lie two one-way streets: an
inbox (``_inbox``, guarded with ``_stopping`` by ``_door``, a Condition on which the thread sleeps
while it has nothing to do) and ``loop.call_soon_threadsafe`` with immutable Deltas, once per step.
The lock is never held while the engine works, and there is no other, so nothing waits in a ring.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence

from qoq.engine.engine import Engine
from qoq.engine.request import SamplingParams, Update
from qoq.engine.stats import EngineStats
from qoq.errors import RequestError
from qoq.server.errors import bad_request, engine_dead, queue_full, shutting_down
from qoq.server.generation import Delta, Generation, Ticket
from qoq.server.heap import return_free_memory
from qoq.server.metrics import ServerMetrics
from qoq.server.watchdog import Watchdog, where

_LOG = logging.getLogger("qoq.server")
_LAST_STEP_S = 10.0  # what a step that still runs gets when the engine is closed
_DEAD_S = 1.0  # one that hangs will not use it
_RESTS_S = 1.0  # without work, before memory is tidied
_STALLED_S = 0.05  # how long to wait for news when a step could do nothing (the cache is full)


class AsyncEngine:
    """Takes prompts from the event loop and gives Generations; start and close it on that loop."""

    def __init__(
        self,
        engine: Engine,
        metrics: Callable[[Callable[[], EngineStats]], ServerMetrics],
        *,
        max_open: int,
        time_limit: float | None = None,
        step_limit: float | None = None,
    ) -> None:
        """At most ``max_open`` texts run or wait; each HTTP request gets ``time_limit`` seconds.
        A step that does not return within ``step_limit`` seconds counts as the engine's death.

        ``metrics`` makes the metrics, given what asks for the engine's latest numbers.
        """
        self._engine = engine
        self._max_open = max_open
        self._time_limit = time_limit
        self._step_limit = step_limit
        self.on_death: Callable[[], None] = lambda: None
        self.death: BaseException | None = None
        self.draining = False
        self.stats = engine.stats()  # as of the last step
        self.metrics = metrics(lambda: self.stats)
        self._open: set[Ticket] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._watchdog = Watchdog(step_limit)
        self._watch: asyncio.Task[None] | None = None
        self._door = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        self._stopping = False
        self._tickets: dict[int, Ticket] = {}  # id(Request) -> its ticket; the thread's own

    # --- the event loop's side ---

    @property
    def alive(self) -> bool:
        """Whether requests can be answered."""
        return self.death is None and self._thread is not None and self._thread.is_alive()

    @property
    def stuck(self) -> bool:
        """Whether the thread still works after ``close``: it hangs, or its step takes too long."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def num_open(self) -> int:
        """Texts that run or wait."""
        return len(self._open)

    def start(self) -> None:
        """Start the thread; its results go to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="qoq-engine", daemon=True)
        self._thread.start()
        self._watch = self._loop.create_task(self._bury())

    def submit(
        self,
        prompts: Sequence[tuple[Sequence[int], SamplingParams]],
        *,
        priority: int = 0,
        salt: str = "",
    ) -> Generation:
        """Put the prompts of one HTTP request in line, all or none; lower ``priority`` goes first.
        Cached prefixes are shared with requests of the same ``salt``.

        Raises APIError 503 where the engine is dead, drains or its queue is full, and 400 for more
        prompts than could ever be taken at once. What the engine has against a prompt is told by
        ``Generation.accepted``.
        """
        if not self.alive:
            raise engine_dead()
        if self.draining:
            self.metrics.rejected("shutting_down", len(prompts))
            raise shutting_down()
        self.check_count(len(prompts))
        if len(self._open) + len(prompts) > self._max_open:
            self.metrics.rejected("queue_full", len(prompts))
            raise queue_full()
        generation = Generation(
            prompts,
            give_up=self._give_up,
            time_limit=self._time_limit,
            priority=priority,
            salt=salt,
        )
        self._open.update(generation.tickets)
        self._idle.clear()
        self._post(*[self._adding(ticket) for ticket in generation.tickets])
        return generation

    def check_count(self, texts: int) -> None:
        """Raise an APIError 400 for more texts than one request can ever have taken."""
        if texts > self._max_open:
            raise bad_request(
                f"The request asks for {texts} texts; this server takes {self._max_open} at a "
                "time. Send fewer prompts, or a smaller n, in one request."
            )

    async def drain(self, timeout: float) -> bool:
        """Take nothing new and wait for what is open; what is left after ``timeout`` s gets a 503.

        True if everything came to its own end.
        """
        self.draining = True
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            for ticket in list(self._open):
                self._give_up(ticket)
                ticket.generation.fail(shutting_down())
            return False
        return True

    async def close(self) -> None:
        """End the thread, whatever is open; returns when it has gone, or is ``stuck``."""
        await self.drain(0)
        if self._watch is not None:
            self._watch.cancel()
        with self._door:
            self._stopping = True
            self._door.notify()
        if self._thread is not None:
            wait = _LAST_STEP_S if self.death is None else _DEAD_S
            await asyncio.to_thread(self._thread.join, wait)

    def _give_up(self, ticket: Ticket) -> None:
        """Nobody waits for this text any more."""
        self._end(ticket, "abort")
        self._post(lambda: self._abort(ticket))

    def _end(self, ticket: Ticket, reason: str) -> None:
        if ticket.open:
            ticket.open = False
            self._open.discard(ticket)
            self.metrics.ended(reason)
            if not self._open:
                self._idle.set()

    def _post(self, *commands: Callable[[], None]) -> None:
        with self._door:
            self._inbox.extend(commands)
            self._door.notify()

    def _deliver(
        self, news: Sequence[tuple[Ticket, Delta]], stats: EngineStats, stepped: bool
    ) -> None:
        """What one step gave, handed to its readers."""
        self.stats = stats
        if stepped and stats.step_tokens:
            self.metrics.iteration_tokens.observe(stats.step_tokens)
        try:
            for ticket, delta in news:
                if not ticket.open:
                    continue  # given up while the step ran
                self.metrics.observe(ticket, delta)
                if delta.finish_reason is not None:
                    self._end(ticket, delta.finish_reason)
                ticket.generation.push(ticket.index, delta)
        except Exception as error:  # a bug; readers must not wait for what was lost
            _LOG.critical("news cannot be delivered; no request can be answered", exc_info=error)
            self._die(error)

    async def _bury(self) -> None:
        """Wait for work that never ends, and call the engine dead."""
        await self._watchdog.watch()
        _LOG.critical(
            "a step has not returned for %g s; no request can be answered. If this machine is that "
            "slow, raise --engine-step-timeout. The engine is at:\n%s",
            self._step_limit,
            where(self._thread),
        )
        self._die(TimeoutError("a step has not returned"))

    def _answer_add(self, ticket: Ticket, refusal: RequestError | None) -> None:
        ticket.accepted = True
        if refusal is not None:
            self._open.discard(ticket)  # never was a request: it counts nowhere
            ticket.open = False
            if not self._open:
                self._idle.set()
            ticket.generation.fail(refusal)
        ticket.generation.wake()

    def _die(self, cause: BaseException) -> None:
        self.death = self.death or cause
        for ticket in list(self._open):
            self._end(ticket, "abort")
            ticket.generation.fail(engine_dead())
        self.on_death()

    # --- the engine thread's side ---

    def _run(self) -> None:
        try:
            while self._work():
                pass
        except BaseException as error:
            _LOG.critical("the engine has died; no request can be answered", exc_info=error)
            cause = error  # the name above ends with this block, the call comes later
            self._tell(lambda: self._die(cause))

    def _work(self) -> bool:
        """What waits in the inbox, then one step; False when it is time to end."""
        self._wait_for_work()
        with self._door:
            commands, self._inbox = self._inbox, []
            stopping = self._stopping
        self._watchdog.begin()
        try:
            return self._do(commands, stopping)
        finally:
            self._watchdog.end()

    def _wait_for_work(self) -> None:
        def there() -> bool:
            return bool(self._inbox or self._stopping or self._engine.unfinished)

        with self._door:
            if self._door.wait_for(there, _RESTS_S):
                return
        return_free_memory()
        with self._door:
            self._door.wait_for(there)

    def _do(self, commands: Sequence[Callable[[], None]], stopping: bool) -> bool:
        for command in commands:
            command()  # aborts too, so that an engine that is left is left empty
        if stopping:
            return False
        if not self._engine.unfinished:
            self._send([], stepped=False)
            return True
        updates = self._engine.step()
        self._send(updates, stepped=True)
        if not updates and not self._engine.stats().step_tokens:
            with self._door:  # nothing could run: wait for an abort rather than spin
                if not self._inbox:
                    self._door.wait(_STALLED_S)
        return True

    def _adding(self, ticket: Ticket) -> Callable[[], None]:
        def add() -> None:
            refusal = None
            try:
                ticket.request = self._engine.add(
                    ticket.prompt_ids,
                    ticket.params,
                    priority=ticket.priority,
                    cache_salt=ticket.salt,
                )
                self._tickets[id(ticket.request)] = ticket
            except RequestError as error:
                refusal = error
            self._tell(lambda: self._answer_add(ticket, refusal))

        return add

    def _abort(self, ticket: Ticket) -> None:
        request = ticket.request
        if request is not None and id(request) in self._tickets:
            del self._tickets[id(request)]
            self._engine.abort(request)

    def _send(self, updates: Sequence[Update], *, stepped: bool) -> None:
        """Turn a step's updates into Deltas, one per request, and hand them to the event loop."""
        texts: dict[Ticket, str] = {}
        for update in updates:
            ticket = self._tickets.get(id(update.request))
            if ticket is not None:
                texts[ticket] = texts.get(ticket, "") + update.text
        now = time.monotonic()
        news = [(ticket, _delta(ticket, text, now)) for ticket, text in texts.items()]
        for ticket, delta in news:
            if delta.finish_reason is not None:
                del self._tickets[id(ticket.request)]
        stats = self._engine.stats()
        self._tell(lambda: self._deliver(news, stats, stepped))

    def _tell(self, call: Callable[[], None]) -> None:
        try:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(call)
        except RuntimeError:  # the loop is closed: nobody is left to hear it
            with self._door:
                self._stopping = True


def _delta(ticket: Ticket, text: str, now: float) -> Delta:
    """What is new of a ticket's request since the last Delta; on the engine thread."""
    request = ticket.request
    assert request is not None  # it had an update
    start, ticket.seen = ticket.seen, request.num_new
    return Delta(
        text=text,
        token_ids=tuple(request.ids[len(request.prompt_ids) + start :]),
        logprobs=tuple(request.logprobs[start:]),
        likeliest=tuple(request.top_logprobs[start:]),
        prompt=() if start else tuple(request.prompt_logprobs),
        finish_reason=request.finish_reason,
        stop_reason=request.stop_reason,
        cached_tokens=request.num_cached_prompt_tokens,
        admitted_at=request.admitted_at,
        at=now,
    )
