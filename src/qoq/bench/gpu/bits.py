"""bits: the exact sums of linear on the GPU, bit for bit those of the oracle there and on the CPU.

Weights and rows are random, sizes odd and large; what the kernel forgets to write is poison.
"""

from collections.abc import Iterator, Sequence

import torch

from qoq.bench.gpu.bench import Bench, Row
from qoq.bench.random_weights import random_weight
from qoq.formats.activation import QuantizedActivation, quantize_per_token
from qoq.formats.scheme import WeightFormat
from qoq.formats.weights import PackedWeight
from qoq.kernels.linear import int_matmul

FORMATS = {
    "g128": WeightFormat(4, 128),
    "g32": WeightFormat(4, 32),
    "channel": WeightFormat(4),
    "int8": WeightFormat(8),
}
SIZES = (
    *((1, 4096, 4096), (3, 392, 1056), (16, 6144, 4096), (17, 1000, 14336), (64, 28672, 4096)),
    *(
        (100, 264, 32),
        (129, 4096, 14336),
        (257, 10240, 8192),
        (1000, 512, 28672),
        (2049, 776, 4096),
    ),
)
CPU_PRODUCTS = 1 << 31
"""Sizes with more products than this are compared on the GPU alone."""
POISON = -(1 << 31)
Size = tuple[int, int, int]


def cases(sizes: Sequence[Size] = SIZES) -> list[tuple[str, Size]]:
    """Every format at every size that it can have."""
    return [
        (name, size)
        for name, fmt in FORMATS.items()
        for size in sizes
        if not fmt.group_size or size[2] % fmt.group_size == 0
    ]


def rows(bench: Bench, sizes: Sequence[Size] = SIZES) -> Iterator[Row]:
    """How many sums differ from the oracle's, per format and size (M, N, K)."""
    for name, (m, n, k) in cases(sizes):
        x, weight, got = _sums(bench, name, (m, n, k))
        truth = int_matmul(x.codes, weight.int8())
        row = {"format": name, "M": m, "N": n, "K": k, "wrong": int((got != truth).sum())}
        if m * n * k <= CPU_PRODUCTS:
            on_cpu = int_matmul(x.codes.cpu(), weight.int8().cpu())
            row["wrong_cpu"] = int((got.cpu() != on_cpu).sum())
        yield row


def warm(bench: Bench, share: int, of: int) -> None:
    """Compile what every ``of``-th case needs, from ``share`` on, by running it once."""
    for name, size in cases()[share::of]:
        _sums(bench, name, size)


def failed(rows: list[Row]) -> bool:
    """Whether any sum differed."""
    return any(row["wrong"] or row.get("wrong_cpu") for row in rows)


def lines(rows: list[Row]) -> list[str]:
    """For people."""
    bad = [row for row in rows if failed([row])]
    verdict = "every int32 sum equals the oracle's" if not bad else f"{len(bad)} DIFFER"
    out = [f"linear, {len(rows)} products: {verdict}"]
    return [*out, *(f"  {row}" for row in bad)]


def _sums(
    bench: Bench, name: str, size: Size
) -> tuple[QuantizedActivation, PackedWeight, torch.Tensor]:
    """Random rows, a random weight, and what the kernel says of them."""
    from qoq.kernels.gpu.linear import prepare

    m, n, k = size
    weight = random_weight(n, k, FORMATS[name], device=bench.device, seed=m + n + k)
    x = quantize_per_token(torch.randn(m, k, device=bench.device))
    out = torch.full((m, n), POISON, dtype=torch.int32, device=bench.device)
    return x, weight, prepare(weight).multiply_into(out, x)
