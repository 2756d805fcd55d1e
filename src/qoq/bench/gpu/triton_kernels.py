"""Triton kernels that only the check needs."""

import triton
import triton.language as tl

READ_BLOCK = 8192


@triton.jit
def read_kernel(source, out, count, BLOCK: tl.constexpr):
    """out[i] = the sum of the i-th block of int32."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(source + at, mask=at < count, other=0)
    tl.store(out + tl.program_id(0), tl.sum(values))


@triton.jit
def product_kernel(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """out fp32 [M, N] = a fp16 [M, K] times b fp16 [K, N], in one product."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left = tl.load(a + m[:, None] * K + k[None, :])
    right = tl.load(b + k[:, None] * N + n[None, :])
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(left, right))
