"""Each op at real shapes, timed against its roof: the least time its operations and bytes allow.

What a model would read from memory must not lie in a cache here: weights and pages are measured in
as many copies, in turn, as make COLD_BYTES, as a model's layers follow one another.
"""

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from qoq.bench.random_weights import random_linears
from qoq.bench.roof import Roof, timed
from qoq.formats.activation import quantize_per_token
from qoq.formats.scheme import WeightFormat
from qoq.kernels.act_quant import rms_norm_quant, silu_mul_quant
from qoq.kernels.linear import linear
from qoq.models.anatomy import INPUTS, layer_linears
from qoq.models.config import ModelConfig

PAGE_SIZE = 64
COLD_BYTES = 256 << 20
ENOUGH_SECONDS = 0.2  # of timed runs per case, within MIN_RUNS and MAX_RUNS
MIN_RUNS, MAX_RUNS = 3, 50


@dataclass(frozen=True)
class Row:
    """One op at one size. ``shape`` names the linear (N x K) or the attention (heads, context);
    M is the number of rows; ``fraction`` = roof_seconds / seconds.
    """

    op: str
    shape: str
    M: int
    seconds: float
    roof_seconds: float
    fraction: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def linear_rows(
    config: ModelConfig, fmt: WeightFormat, rows: Sequence[int], roof: Roof
) -> Iterator[Row]:
    """Every fused linear of a layer, at every number of rows."""
    for tap, parts in INPUTS.items():
        specs = [spec for spec in layer_linears(config) if spec.name in parts]
        n, k = sum(spec.out_features for spec in specs), specs[0].in_features
        weights, weight_bytes = random_linears(n, k, fmt, COLD_BYTES)
        turn = itertools.cycle(weights)
        for m in rows:
            x = quantize_per_token(torch.randn(m, k))
            seconds = _median(lambda x=x, turn=turn: linear(x, next(turn)))
            least = roof.seconds(2 * m * n * k, weight_bytes + m * k)
            yield row_of("linear", f"{tap} {n}x{k} {_weight_name(fmt)}", m, seconds, least)


def row_rows(config: ModelConfig, rows: Sequence[int], roof: Roof) -> Iterator[Row]:
    """The ops that turn float rows into int8 rows; their roof is reading the floats."""
    hidden, inner = config.hidden_size, config.intermediate_size
    for m in rows:
        x, residual, gain = torch.randn(m, hidden), torch.randn(m, hidden), torch.ones(hidden)
        seconds = _median(lambda x=x, r=residual, g=gain: rms_norm_quant(x, g, 1e-5, 8, r))
        yield row_of("rms_norm_quant", f"{hidden}", m, seconds, roof.seconds(0, 8 * m * hidden))
        gate_up = torch.randn(m, 2 * inner)
        seconds = _median(lambda gate_up=gate_up: silu_mul_quant(gate_up, 8))
        yield row_of("silu_mul_quant", f"{inner}", m, seconds, roof.seconds(0, 8 * m * inner))


def row_of(op: str, shape: str, m: int, seconds: float, least: float) -> Row:
    """A Row, its fraction computed."""
    return Row(op, shape, m, seconds, least, least / seconds)


def _weight_name(fmt: WeightFormat) -> str:
    return f"w{fmt.bits}" + (f"-g{fmt.group_size}" if fmt.group_size else "")


def _median(run: Any) -> float:
    once = timed(run, 1)[0]
    repeats = int(min(MAX_RUNS, max(MIN_RUNS, ENOUGH_SECONDS / max(once, 1e-6))))
    return statistics.median(timed(run, repeats))
