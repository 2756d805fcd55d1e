"""Small kernels for the tests of what takes machine code apart."""

import triton
import triton.language as tl


@triton.jit
def masked_product(w, x, y, K: tl.constexpr, TOKENS: tl.constexpr):
    """y int32 [64, TOKENS] = (w uint8 [64, K] & 15) times x int8 [TOKENS, K] transposed."""
    row, token, k = tl.arange(0, 64), tl.arange(0, TOKENS), tl.arange(0, 128)
    acc = tl.zeros((64, TOKENS), tl.int32)
    for start in range(0, K, 128):
        tile = tl.load(w + row[:, None] * K + start + k[None, :])
        codes = tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0x0F0F0F0F;", "=r,r", [tile], dtype=tl.int8, is_pure=True, pack=4
        )
        rows = tl.load(x + token[None, :] * K + start + k[:, None])
        acc = tl.dot(codes, rows, acc, out_dtype=tl.int32)
    tl.store(y + row[:, None] * TOKENS + token[None, :], acc)
