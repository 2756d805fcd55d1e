"""Products of torch's own that ours are compared with; each may be missing somewhere."""

import torch

from qoq.bench.gpu.bench import Bench
from qoq.bench.gpu.clock import Run

INT4_GROUP = 128
_INT_MM_LEAST = 17  # rows that torch._int_mm takes at least


def bf16_matmul(bench: Bench, m: int, n: int, k: int) -> Run:
    """cuBLAS: bf16 x [m, k] times a bf16 weight [n, k]."""
    x = _randn(bench, m, k)

    def make() -> torch.Tensor:
        return _randn(bench, n, k)

    return bench.in_turn("torch bf16", make, 2 * n * k, lambda w: torch.nn.functional.linear(x, w))


def fp8_matmul(bench: Bench, m: int, n: int, k: int) -> Run:
    """torch._scaled_mm: fp8 times fp8 with a scale per row and per channel, bf16 out."""

    def call(weight: torch.Tensor) -> torch.Tensor:
        return torch._scaled_mm(
            x,
            weight.t(),
            scale_a=row_scale,
            scale_b=channel_scale,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    fp8 = torch.float8_e4m3fn
    x = _randn(bench, m, k).to(fp8)
    row_scale = torch.ones(m, 1, device=bench.device)
    channel_scale = torch.ones(1, n, device=bench.device)
    return bench.in_turn("torch fp8", lambda: _randn(bench, n, k).to(fp8), n * k, call)


def int8_matmul(bench: Bench, m: int, n: int, k: int) -> Run:
    """torch._int_mm: int8 times int8 to int32, without scales."""
    x = _randint8(bench, m, k)

    def call(weight: torch.Tensor) -> torch.Tensor:
        if m < _INT_MM_LEAST:
            raise NotImplementedError(f"torch._int_mm takes {_INT_MM_LEAST} rows or more")
        return torch._int_mm(x, weight.t())

    return bench.in_turn("torch int8", lambda: _randint8(bench, n, k), n * k, call)


def int4_matmul(bench: Bench, m: int, n: int, k: int) -> Run:
    """torch._weight_int4pack_mm: bf16 x times 4-bit weights in groups of INT4_GROUP."""
    x = _randn(bench, m, k)

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=bench.device)
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        return packed, _randn(bench, k // INT4_GROUP, n, 2)

    def call(weight: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        out: torch.Tensor = torch.ops.aten._weight_int4pack_mm(x, weight[0], INT4_GROUP, weight[1])
        return out

    return bench.in_turn("torch int4", make, n * k // 2, call)


def _randn(bench: Bench, *shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=bench.device)


def _randint8(bench: Bench, *shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, device=bench.device)
