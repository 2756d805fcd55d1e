"""Watchdog: tells an engine that hangs from one that is busy or asleep."""

import asyncio
import sys
import threading
import traceback

_TICK_S = 1.0


class Watchdog:
    """The engine's thread says when it takes up work and when it has done it; ``watch`` waits for
    work that is never done.

    Time is counted in the event loop's own ticks, so that a process that was stopped for a while
    (a debugger, a paused container) is not taken for one that hangs.
    """

    def __init__(self, limit: float | None) -> None:
        """``limit`` in seconds for one piece of work; None or 0: ``watch`` never returns."""
        self._limit = limit or float("inf")
        self._begun = 0  # pieces of work; written by the engine's thread alone, as is the next
        self._done = 0

    def begin(self) -> None:
        """Work is taken up."""
        self._begun += 1

    def end(self) -> None:
        """It is done."""
        self._done = self._begun

    async def watch(self) -> None:
        """Return once one piece of work has lasted longer than the limit."""
        tick = min(_TICK_S, self._limit / 4)
        seen, lasted = 0, 0.0
        while lasted < self._limit:
            await asyncio.sleep(tick)
            begun = self._begun
            lasted = lasted + tick if begun == seen and self._done != begun else 0.0
            seen = begun


def where(thread: threading.Thread | None) -> str:
    """What a thread is doing, as a traceback."""
    frame = sys._current_frames().get(thread.ident or 0) if thread is not None else None
    return "".join(traceback.format_stack(frame)) if frame is not None else "no thread"
