"""The parts of the check, in their order, each with its share of the time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from qoq.bench.gpu import (
    attention,
    bits,
    ceilings,
    environment,
    gemm,
    model,
    row_kernels,
    subnormal,
    tests,
)
from qoq.bench.gpu.bench import Bench, Row


def _never(rows: Sequence[Row]) -> bool:
    return False


@dataclass(frozen=True)
class Part:
    """``rows`` measures or checks, result by result; ``lines`` prints them; ``failed`` tells
    whether they show an error; ``warm(bench, share, of)`` compiles kernels ahead, shared among
    processes. ``seconds`` and ``warm_seconds`` are enough on an H200, with some to spare.
    """

    name: str
    seconds: float
    rows: Callable[[Bench], Iterator[Row]]
    lines: Callable[[list[Row]], list[str]]
    failed: Callable[[list[Row]], bool] = _never
    warm: Callable[[Bench, int, int], None] | None = None
    warm_seconds: float = 0.0


PARTS = {
    part.name: part
    for part in (
        Part("env", 15, environment.rows, environment.lines),
        Part("ceilings", 30, ceilings.rows, ceilings.lines, ceilings.failed),
        Part("subnormal", 15, subnormal.rows, subnormal.lines, subnormal.failed),
        Part(
            "tests",
            110,
            lambda bench: tests.rows(seconds=bench.seconds - 5),
            tests.lines,
            tests.failed,
        ),
        Part("bits", 15, bits.rows, bits.lines, bits.failed, bits.warm, 20),
        Part("gemm", 50, gemm.rows, gemm.lines, gemm.failed, gemm.warm, 45),
        Part(
            "attention", 35, attention.rows, attention.lines, attention.failed, attention.warm, 25
        ),
        Part(
            "rows",
            20,
            row_kernels.rows,
            row_kernels.lines,
            row_kernels.failed,
            row_kernels.warm,
            15,
        ),
        Part("model", 60, model.rows, model.lines, model.failed, model.warm, 25),
    )
}
"""By name; together eight minutes at most."""

NEED_CEILINGS = ("gemm", "attention", "rows")
"""Parts that count floors."""
