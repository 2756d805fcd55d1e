"""Times of calls on a GPU: recorded in CUDA graphs, replayed in turn, medians.

A launch from Python takes longer than many a kernel. So a run's calls are recorded one after the
other in one graph, and a replay is timed by events around it; launch gaps are those of a GPU that
is kept busy. Runs that are compared take turns, so that a GPU that slows down slows all alike.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

MIN_REPLAY_SECONDS = 1e-3  # of work in a graph
MIN_ROUNDS, MAX_ROUNDS = 5, 40
MAX_CALLS = 1000


@dataclass(frozen=True)
class Run:
    """Something to time. Call after call takes the next of ``copies`` sets of buffers, together so
    large that none is in a cache when its turn comes again.
    """

    name: str
    call: Callable[[], object]
    copies: int = 1


Clock = Callable[[Sequence[Run]], list[float | str]]
"""Seconds of one call of each run (median), or why it cannot be run."""


class GraphClock:
    """A Clock. ``seconds`` bounds the time spent on the runs of one comparison, about."""

    def __init__(self, seconds: float = 0.2) -> None:
        self._seconds = seconds

    def __call__(self, runs: Sequence[Run]) -> list[float | str]:
        recorded = [_attempt(run) for run in runs]
        ready = [one for one in recorded if not isinstance(one, str)]
        round_seconds = sum(one.replay_seconds for one in ready)
        rounds = int(self._seconds / round_seconds) if round_seconds else 0
        rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, rounds))
        times: dict[int, list[float]] = {id(one): [] for one in ready}
        for _ in range(rounds):
            for one in ready:
                times[id(one)].append(one.time())
        return [
            one if isinstance(one, str) else statistics.median(times[id(one)]) for one in recorded
        ]


def _attempt(run: Run) -> "_Recorded | str":
    """The run, ready to be timed; or the first line of what it raises (a peer may be missing)."""
    try:
        return _Recorded(run)
    except Exception as error:  # whatever a library raises
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"{type(error).__name__}: {first[:200]}"


class _Recorded:
    """A run's calls in a graph; or, where they cannot be recorded, called as they are."""

    def __init__(self, run: Run) -> None:
        self._run = run
        run.call()  # compiles, and allocates what is allocated once
        torch.cuda.synchronize()
        self._calls = self._enough(_seconds(run.call))
        self._replay = self._record()
        self._replay()
        enough = self._enough(self.time())
        if enough > 2 * self._calls:  # a launch took longer than what it launched
            self._calls = enough
            self._replay = self._record()
            self._replay()
        self.replay_seconds = _seconds(self._replay)

    def time(self) -> float:
        """Seconds of one call, from one replay."""
        return _seconds(self._replay) / self._calls

    def _enough(self, once: float) -> int:
        """Calls of so many seconds that are worth a replay, whose own start takes some us."""
        wanted = max(self._run.copies, math.ceil(MIN_REPLAY_SECONDS / max(once, 1e-7)))
        return min(MAX_CALLS, wanted)

    def _record(self) -> Callable[[], Any]:
        def calls() -> None:
            for _ in range(self._calls):
                self._run.call()

        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                self._run.call()
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph, stream=stream):
                calls()
        except RuntimeError:  # some libraries synchronize, which a graph cannot hold
            torch.cuda.synchronize()
            return calls
        return graph.replay


def _seconds(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
