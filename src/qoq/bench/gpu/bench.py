"""Bench: what every part of the check is given."""

import itertools
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from qoq.bench.gpu.clock import Clock, Run

COLD_BYTES = 256 << 20  # several times the largest L2 there is
T = TypeVar("T")
Row = dict[str, Any]
"""One result, JSON-ready."""


@dataclass(frozen=True)
class Ceilings:
    """What this GPU was seen to do at most: bytes per second, int8 and bf16 operations per second
    (two per product).
    """

    read: float
    int8: float
    bf16: float

    def seconds(self, moved: float, int8_ops: float = 0) -> float:
        """The floor: the least time for so many bytes and operations, whichever takes longer."""
        return max(moved / self.read, int8_ops / self.int8)


@dataclass(frozen=True)
class Bench:
    """``backend`` is that of our kernels; ``ceilings`` those measured before, if any were;
    ``seconds``: what the part may take.
    """

    device: torch.device
    clock: Clock
    backend: str = "gpu"
    ceilings: Ceilings | None = None
    cold_bytes: int = COLD_BYTES
    seconds: float = 60.0

    def in_turn(
        self, name: str, make: Callable[[], T], size: int, call: Callable[[T], object]
    ) -> Run:
        """A run that goes through copies of ``make()``, ``size`` bytes each, so that what it reads
        comes from memory. They are made when it is first called.
        """
        copies = max(1, -(-self.cold_bytes // max(size, 1)))
        turn: Iterator[T] | None = None

        def run() -> object:
            nonlocal turn
            if turn is None:
                turn = itertools.cycle([make() for _ in range(copies)])
            return call(next(turn))

        return Run(name, run, copies)

    def compare(self, runs: Sequence[Run], **about: Any) -> Iterator[Row]:
        """A row for each run: ``about``, its name as ``system``, and ``us`` or ``missing``."""
        for run, seconds in zip(runs, self.clock(runs), strict=True):
            if isinstance(seconds, str):
                yield {**about, "system": run.name, "missing": seconds}
            else:
                yield {**about, "system": run.name, "us": seconds * 1e6}


def left_out(rows: Sequence[Row]) -> list[str]:
    """For people: what was not measured, and why."""
    absent = [(row["system"], row["missing"].splitlines()[0]) for row in rows if "missing" in row]
    return [f"  no {system} ({count}x): {why}" for (system, why), count in Counter(absent).items()]


def broken(rows: Sequence[Row], ours: Container[str]) -> bool:
    """Whether one of ``ours`` could not be measured, and not because this GPU is small."""
    return any(
        row["system"] in ours and not row["missing"].startswith("OutOfMemoryError")
        for row in rows
        if "missing" in row
    )
