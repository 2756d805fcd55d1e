"""subnormal: do tensor cores take fp16 numbers below the smallest normal one as they are?

Attention reads 4-bit codes as such numbers: ``code * 2^-24``, ``code * 2^-20``. If a product of
them is not exact, its kernels must unpack codes another way.
"""

from collections.abc import Iterator

import torch

from qoq.bench.gpu.bench import Bench, Row

SHAPES = ((16, 16, 64), (64, 16, 64), (64, 64, 64), (128, 128, 64))
"""M, N, K of the product: the instructions of older tensor cores, and Hopper's."""


def rows(bench: Bench) -> Iterator[Row]:
    """How many of the results differ from the exact ones, for each shape and power of two."""
    from qoq.bench.gpu.triton_kernels import product_kernel

    for m, n, k in SHAPES:
        for shift in (0, 4):
            codes = torch.randint(0, 16, (m, k), dtype=torch.int16, device=bench.device)
            x = torch.randint(-512, 513, (k, n), device=bench.device)
            a = (codes << shift).view(torch.float16)
            out = torch.full((m, n), torch.nan, dtype=torch.float32, device=bench.device)
            product_kernel[1,](a, x.half(), out, M=m, N=n, K=k, num_warps=4)
            exact = (codes.double() @ x.double()) * 2.0 ** (shift - 24)
            wrong = int((out.double() != exact).sum())
            yield {"M": m, "N": n, "K": k, "unit": f"2^{shift - 24}", "wrong": wrong}


def failed(rows: list[Row]) -> bool:
    """Whether any product was not exact."""
    return any(row["wrong"] for row in rows)


def lines(rows: list[Row]) -> list[str]:
    """For people."""
    wrong = sum(row["wrong"] for row in rows)
    return [f"fp16 subnormals: {len(rows)} products, " + ("exact" if not wrong else "NOT exact")]
