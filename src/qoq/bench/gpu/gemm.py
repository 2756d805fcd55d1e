"""gemm: the linears of real models at growing numbers of rows, beside torch's products."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from qoq.bench.gpu.bench import Bench, Row, broken, left_out
from qoq.bench.gpu.clock import Run
from qoq.bench.gpu.peers import bf16_matmul, fp8_matmul, int4_matmul, int8_matmul
from qoq.bench.random_weights import random_weight
from qoq.bench.shapes import config_of
from qoq.formats.activation import quantize_per_token
from qoq.formats.scheme import WeightFormat
from qoq.formats.weights import PackedWeight
from qoq.kernels.linear import linear, prepare
from qoq.kernels.prepared import PreparedWeight
from qoq.models.anatomy import INPUTS, layer_linears, packed_linear_tensors

MODELS = ("llama-3-8b", "llama-3-70b")
ROWS = (1, 16, 64, 128, 256, 1024, 4096)
OURS = {
    "ours w4a8-g128": WeightFormat(4, 128),
    "ours w4a8": WeightFormat(4),
    "ours w8a8": WeightFormat(8),
}
INT4_ROWS = 256  # beyond these a kernel that unpacks to bf16 is no peer


@dataclass(frozen=True)
class Case:
    """One linear [n, k] of a model, at m rows."""

    model: str
    name: str
    n: int
    k: int
    m: int


def cases(models: Sequence[str] = MODELS, rows: Sequence[int] = ROWS) -> list[Case]:
    """Every linear at every number of rows; those of decoding first."""
    shapes = []
    for model in models:
        config = config_of(model, 1)
        for tap, parts in INPUTS.items():
            specs = [spec for spec in layer_linears(config) if spec.name in parts]
            n = sum(spec.out_features for spec in specs)
            shapes.append((model, tap, n, specs[0].in_features))
    return [Case(*shape, m) for m in rows for shape in shapes]


def rows(bench: Bench, chosen: Sequence[Case] | None = None) -> Iterator[Row]:
    """Each case: ours in every format, then torch's; with the floor of what ours must move."""
    for case in cases() if chosen is None else chosen:
        m, n, k = case.m, case.n, case.k
        ours = {name: _ours(bench, name, fmt, m, n, k) for name, fmt in OURS.items()}
        peers = [bf16_matmul(bench, m, n, k), fp8_matmul(bench, m, n, k)]
        peers.append(int8_matmul(bench, m, n, k))
        if m <= INT4_ROWS:
            peers.append(int4_matmul(bench, m, n, k))
        about = {"model": case.model, "linear": case.name, "n": n, "k": k, "M": m}
        for row in bench.compare([*(run for run, _ in ours.values()), *peers], **about):
            if "us" in row:
                row["tops"] = 2 * m * n * k / row["us"] / 1e6
            if "us" in row and row["system"] in ours and bench.ceilings is not None:
                moved = ours[row["system"]][1] + m * k + 4 * m * n
                floor = bench.ceilings.seconds(moved, 2 * m * n * k) * 1e6
                row |= {"floor_us": floor, "of_floor": floor / row["us"]}
            yield row


def warm(bench: Bench, share: int, of: int) -> None:
    """Compile what every ``of``-th case needs, from ``share`` on, by running it once."""
    for case in cases()[share::of]:
        x = quantize_per_token(torch.randn(case.m, case.k, device=bench.device))
        for fmt in OURS.values():
            linear(x, _weight(bench, fmt, case.n, case.k))


def lines(rows: list[Row]) -> list[str]:
    """A line for each case: our times with their share of the floor, then torch's."""
    systems = [*OURS, "torch bf16", "torch fp8", "torch int8", "torch int4"]
    out = [
        f"{'us (share of the floor)':32}" + "".join(f"{system:>16}" for system in systems),
    ]
    named: dict[tuple[str, str, int], dict[str, Row]] = {}
    for row in rows:
        key = (row["model"], row["linear"], row["M"])
        named.setdefault(key, {})[row["system"]] = row
    for (model, name, m), found in named.items():
        cells = (_cell(found.get(system)) for system in systems)
        out.append(f"{model + ' ' + name:25} M {m:4} " + "".join(f"{cell:>16}" for cell in cells))
    return [*out, *left_out(rows)]


def failed(rows: Sequence[Row]) -> bool:
    """Whether one of our products could not be run."""
    return broken(rows, OURS)


def _cell(row: Row | None) -> str:
    if row is None or "us" not in row:
        return "-"
    share = f" {100 * row['of_floor']:3.0f}%" if "of_floor" in row else ""
    return f"{row['us']:.1f}{share}"


def _ours(bench: Bench, name: str, fmt: WeightFormat, m: int, n: int, k: int) -> tuple[Run, int]:
    """The run, and the bytes of a weight."""
    x = quantize_per_token(torch.randn(m, k, device=bench.device))
    tensors = packed_linear_tensors("weight", n, k, fmt).values()
    size = sum(math.prod(shape) * (dtype or torch.float32).itemsize for shape, dtype in tensors)

    def call(weight: PackedWeight | PreparedWeight) -> torch.Tensor:
        return linear(x, weight)

    return bench.in_turn(name, lambda: _weight(bench, fmt, n, k), size, call), size


def _weight(bench: Bench, fmt: WeightFormat, n: int, k: int) -> PackedWeight | PreparedWeight:
    return prepare(random_weight(n, k, fmt, device=bench.device), bench.backend)
