"""GraphClock: who is timed, how often and in which order, on a GPU that only keeps a diary."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from qoq.bench.gpu import clock
from qoq.bench.gpu.bench import Bench
from qoq.bench.gpu.clock import GraphClock, Run


class Gpu:
    """Stands for torch.cuda: calls take the seconds they say, graphs repeat what they hold."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []
        self.recording: list[Callable[[], object]] | None = None

    def busy(self, name: str, seconds: float, launch: float = 0.0) -> None:
        """``launch``: what Python takes for it, outside of graphs."""
        if self.recording is not None:
            self.recording.append(lambda: self.busy(name, seconds))
            return
        self.now += seconds + launch
        self.log.append(name)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = gpu.now

            def synchronize(self) -> None:
                """All is done at once."""

            def elapsed_time(self, end: Any) -> float:
                return float(1e3 * (end.at - self.at))

        class Graph:
            calls: list[Callable[[], object]]

            def replay(self) -> None:
                for call in self.calls:
                    call()

        class Stream:
            def wait_stream(self, other: Any) -> None:
                """There is one stream."""

        @contextmanager
        def record(graph: Any, stream: Any) -> Iterator[None]:
            gpu.recording = graph.calls = []
            try:
                yield
            finally:
                gpu.recording = None

        @contextmanager
        def on(stream: Any) -> Iterator[None]:
            yield

        for name, value in {
            "Event": Event,
            "CUDAGraph": Graph,
            "Stream": Stream,
            "graph": record,
            "stream": on,
            "current_stream": Stream,
            "synchronize": lambda: None,
        }.items():
            patch.setattr(torch.cuda, name, value)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    gpu.install(monkeypatch)
    return gpu


def test_runs_take_turns_and_medians_are_of_one_call(gpu: Gpu) -> None:
    runs = [
        Run("fast", lambda: gpu.busy("fast", 3e-4), copies=3),
        Run("slow", lambda: gpu.busy("slow", 2e-3), copies=2),
    ]
    times = GraphClock(seconds=0.05)(runs)
    assert times == pytest.approx([3e-4, 2e-3])
    # A millisecond of the fast one is four calls; the slow one goes through its copies.
    turn = ["fast"] * 4 + ["slow"] * 2
    rounds = int(0.05 / (4 * 3e-4 + 2 * 2e-3))
    assert gpu.log[-len(turn) * rounds :] == turn * rounds
    assert clock.MIN_ROUNDS <= rounds <= clock.MAX_ROUNDS


def test_replays_last_however_long_a_launch_takes(gpu: Gpu) -> None:
    run = Run("short", lambda: gpu.busy("short", 3e-6, launch=4e-5))
    assert GraphClock()([run]) == [pytest.approx(3e-6)]
    replays = len(gpu.log) / clock.MAX_ROUNDS
    assert 3e-6 * replays >= clock.MIN_REPLAY_SECONDS


def test_what_cannot_run_says_why(gpu: Gpu) -> None:
    def broken() -> None:
        raise NotImplementedError("no such product\nand more")

    runs = [Run("broken", broken), Run("fine", lambda: gpu.busy("fine", 1e-3))]
    assert GraphClock()(runs) == ["NotImplementedError: no such product", pytest.approx(1e-3)]
    assert GraphClock()(runs[:1]) == ["NotImplementedError: no such product"]


def test_what_cannot_be_recorded_is_timed_as_it_is(gpu: Gpu) -> None:
    def waits() -> None:
        if gpu.recording is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        gpu.busy("waits", 1e-3)

    assert GraphClock()([Run("waits", waits)]) == [pytest.approx(1e-3)]


def test_copies_are_made_once_and_used_in_turn(gpu: Gpu) -> None:
    made: list[int] = []
    used: list[int] = []

    def make() -> int:
        made.append(len(made))
        return made[-1]

    bench = Bench(torch.device("cpu"), GraphClock(), cold_bytes=1000)
    run = bench.in_turn("run", make, 300, used.append)
    assert run.copies == 4
    assert made == []
    for _ in range(9):
        run.call()
    assert made == [0, 1, 2, 3]
    assert used == [0, 1, 2, 3, 0, 1, 2, 3, 0]


def test_rows_carry_what_they_are_about(gpu: Gpu) -> None:
    def broken() -> None:
        raise ValueError

    bench = Bench(torch.device("cpu"), GraphClock())
    runs = [Run("a", lambda: gpu.busy("a", 5e-6)), Run("b", broken)]
    assert list(bench.compare(runs, M=3)) == [
        {"M": 3, "system": "a", "us": pytest.approx(5)},
        {"M": 3, "system": "b", "missing": "ValueError: ValueError"},
    ]
