"""ceilings: bytes and products per second that this GPU reaches where nothing else is asked of it.

Every floor in the later parts is counted from these, not from a data sheet.
"""

from collections.abc import Iterator, Sequence

import torch

from qoq.bench.gpu.bench import Bench, Ceilings, Row, broken
from qoq.bench.gpu.clock import Run
from qoq.bench.gpu.peers import bf16_matmul, fp8_matmul, int8_matmul
from qoq.bench.random_weights import random_weight
from qoq.formats.activation import quantize_per_token
from qoq.formats.scheme import WeightFormat
from qoq.formats.weights import PackedWeight
from qoq.kernels.linear import linear, prepare
from qoq.kernels.prepared import PreparedWeight

BUFFER = 2 << 30
SIDES = (4096, 8192)
OUR_READ, OUR_PRODUCT = "read, our kernel", "ours w8a8"


def rows(bench: Bench, buffer: int = BUFFER, sides: Sequence[int] = SIDES) -> Iterator[Row]:
    """``bytes_per_s`` or ``ops_per_s`` of each way to use the GPU."""
    yield from _moves(bench, buffer)
    for n in sides:
        runs = [bf16_matmul(bench, n, n, n), int8_matmul(bench, n, n, n)]
        runs += [fp8_matmul(bench, n, n, n), _ours(bench, n)]
        for row in bench.compare(runs, side=n):
            yield {**row, **({"ops_per_s": 2 * n**3 / row["us"] * 1e6} if "us" in row else {})}


def _moves(bench: Bench, buffer: int) -> Iterator[Row]:
    source = torch.randint(-100, 100, (buffer // 4,), dtype=torch.int32, device=bench.device)
    target = torch.empty_like(source)
    runs = [
        Run("copy", lambda: target.copy_(source)),
        Run("read", lambda: source.view(torch.float32).amax()),
        Run(OUR_READ, lambda: read_all(source)),
    ]
    for row in bench.compare(runs):
        moved = 2 * buffer if row["system"] == "copy" else buffer
        yield {**row, **({"bytes_per_s": moved / row["us"] * 1e6} if "us" in row else {})}


def read_all(source: torch.Tensor) -> torch.Tensor:
    """Sums int32 [n] in pieces: what a kernel reads that writes next to nothing."""
    from qoq.bench.gpu.triton_kernels import READ_BLOCK, read_kernel

    pieces = -(-source.numel() // READ_BLOCK)
    out = source.new_empty(pieces)
    read_kernel[pieces,](source, out, source.numel(), BLOCK=READ_BLOCK, num_warps=8)
    return out


def measured(rows: Sequence[Row]) -> Ceilings | None:
    """The best of each kind; None where one is missing."""
    read = max((row["bytes_per_s"] for row in rows if "bytes_per_s" in row), default=0.0)

    def best(*systems: str) -> float:
        fit = (r["ops_per_s"] for r in rows if "ops_per_s" in r and r["system"] in systems)
        return max(fit, default=0.0)

    int8, bf16 = best("torch int8", OUR_PRODUCT), best("torch bf16")
    return Ceilings(read, int8, bf16) if read and int8 and bf16 else None


def failed(rows: Sequence[Row]) -> bool:
    """Whether one of our kernels could not be run."""
    return broken(rows, (OUR_READ, OUR_PRODUCT))


def lines(rows: list[Row]) -> list[str]:
    """For people."""
    out = []
    for row in rows:
        what = f"{row['system']:18}" + (f" {row['side']:5}" if "side" in row else "      ")
        if "missing" in row:
            out.append(f"{what} {row['missing']}")
        elif "bytes_per_s" in row:
            out.append(f"{what} {row['bytes_per_s'] / 1e12:8.2f} TB/s")
        else:
            out.append(f"{what} {row['ops_per_s'] / 1e12:8.0f} TOPS")
    return out


def _ours(bench: Bench, n: int) -> Run:
    """Our own int8 weights times int8 rows, scales and all."""
    x = quantize_per_token(torch.randn(n, n, device=bench.device))

    def make() -> PackedWeight | PreparedWeight:
        return prepare(random_weight(n, n, WeightFormat(8), device=bench.device), bench.backend)

    return bench.in_turn(OUR_PRODUCT, make, n * n, lambda weight: linear(x, weight))
