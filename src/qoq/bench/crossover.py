"""One linear at growing numbers of rows, ours against torch's bf16 and int8 products.

Few rows are bound by reading weights (4 bits beat 8 and 16), many by products (int8 beats bf16): is
there a number of rows in between where a plain library product wins?
"""

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch.nn import functional as F

from qoq.bench.kernels import COLD_BYTES
from qoq.bench.random_weights import random_linears
from qoq.bench.roof import timed
from qoq.errors import RequestError
from qoq.formats.activation import quantize_per_token
from qoq.formats.scheme import WeightFormat
from qoq.kernels.linear import linear
from qoq.models.anatomy import INPUTS, layer_linears
from qoq.models.config import ModelConfig

BASELINE = "torch bf16"
ROUNDS, ROUND_SECONDS, MOST_RUNS = 5, 0.03, 20


@dataclass(frozen=True)
class Point:
    """``seconds`` of one product of M rows, the median of all runs; weights come from memory."""

    system: str
    M: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def crossover(config: ModelConfig, tap: str, rows: Sequence[int]) -> Iterator[Point]:
    """The fused linear ``tap`` (such as gate_up_proj) of one layer, every system at every M.

    Systems take turns. Ours start from int8 rows and end in fp32; torch's bf16 starts and ends in
    bf16, its int8 ends in bare int32 sums. Raises RequestError for an unknown ``tap``.
    """
    if tap not in INPUTS:
        raise RequestError(f"There is no linear {tap!r}; there are {', '.join(INPUTS)}.")
    specs = [spec for spec in layer_linears(config) if spec.name in INPUTS[tap]]
    n, k = sum(spec.out_features for spec in specs), specs[0].in_features
    makers = _systems(n, k)
    for m in rows:
        x = torch.randn(m, k)
        runs = {name: make(x) for name, make in makers.items()}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(ROUNDS):
            for name, run in runs.items():
                once = timed(run, 1)[0]
                repeats = int(min(MOST_RUNS, max(1, ROUND_SECONDS / max(once, 1e-6))))
                seconds[name] += timed(run, repeats)
        for name, each in seconds.items():
            yield Point(name, m, statistics.median(each))


def _systems(n: int, k: int) -> dict[str, Callable[[torch.Tensor], Callable[[], object]]]:
    """Name -> a function that takes rows fp32 [M, K] and returns the product to time."""

    def ours(fmt: WeightFormat) -> Callable[[torch.Tensor], Callable[[], object]]:
        weights = itertools.cycle(random_linears(n, k, fmt, COLD_BYTES)[0])

        def bind(x: torch.Tensor) -> Callable[[], object]:
            codes = quantize_per_token(x)
            return lambda: linear(codes, next(weights))

        return bind

    def copies(dtype: torch.dtype) -> Iterator[torch.Tensor]:
        count = -(-COLD_BYTES // (n * k * dtype.itemsize))
        made = [torch.empty(n, k, dtype=dtype).random_(-100, 100) for _ in range(count)]
        return itertools.cycle(made)

    bf16, int8 = copies(torch.bfloat16), copies(torch.int8)

    def torch_bf16(x: torch.Tensor) -> Callable[[], object]:
        rows = x.to(torch.bfloat16)
        return lambda: F.linear(rows, next(bf16))

    def torch_int8(x: torch.Tensor) -> Callable[[], object]:
        rows = quantize_per_token(x).codes
        return lambda: torch._int_mm(rows, next(int8).T)

    return {
        "w4a8-g128": ours(WeightFormat(4, 128)),
        "w4a8": ours(WeightFormat(4, None)),
        BASELINE: torch_bf16,
        "torch int8": torch_int8,
    }


def picture(points: Sequence[Point], title: str, path: Path) -> None:
    """Speed against torch's bf16 product over M, a line per system, as SVG or PNG by the name."""
    at = {(point.system, point.M): point.seconds for point in points}
    sizes = sorted({point.M for point in points})
    figure = Figure(figsize=(7, 4), layout="tight")
    axes = figure.subplots()
    for system in dict.fromkeys(point.system for point in points):
        gains = [at[BASELINE, m] / at[system, m] for m in sizes]
        axes.plot(sizes, gains, marker="o", label=system)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(m) for m in sizes])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("rows M")
    axes.set_ylabel(f"times as fast as {BASELINE}")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
