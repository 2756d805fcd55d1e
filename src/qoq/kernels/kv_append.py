"""kv_append: RoPE on q and k, then quantized keys and values into pages (QServe section 5.3).

Keys lose a static per-head center before they are quantized (ours, not the paper's: softmax
cannot see a vector subtracted from all keys of a head, while the range to be coded shrinks), and
q and k may be rotated by one orthogonal matrix, which leaves scores unchanged.
"""

import torch
from torch import Tensor

from qoq.formats.kv import KVPages, quantize_heads
from qoq.kernels.dispatch import resolve


def kv_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    pages: KVPages,
    k_center: Tensor | None = None,
    k_rotation: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Write T tokens into pages in place; return the queries fp32 [T, Hq, D] that meet them.

    q [T, Hq, D]; k, v [T, Hkv, D]; cos, sin [T, R] of the tokens' own positions, R = rotary dims/2;
    slots int64 [T] = page * page_size + offset, each at most once, -1 for padding rows, which write
    nothing; k_center [Hkv, D]; k_rotation [D, D] orthogonal. In order: rope(q), rope(k);
    k -= k_center; q @ k_rotation, k @ k_rotation; quantize k and v per token and head.
    """
    run = resolve("kv_append", backend, q.device, q=q, pages=pages)
    out: Tensor = run(q, k, v, cos, sin, slots, pages, k_center, k_rotation)
    return out


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """fp32 [T, H, D]: dims (i, i + R) of every head turned by the angle of cos, sin [T, R].

    The NeoX (half-split) layout of Hugging Face. Dims past 2R, if any, pass unchanged.
    """
    x = x.to(torch.float32)
    r = cos.shape[-1]
    if 2 * r > x.shape[-1]:
        raise ValueError(f"{r} rotary pairs do not fit head_dim {x.shape[-1]}")
    cos, sin = cos.to(torch.float32)[:, None], sin.to(torch.float32)[:, None]
    first, second, rest = x[..., :r], x[..., r : 2 * r], x[..., 2 * r :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def kv_append_oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    pages: KVPages,
    k_center: Tensor | None = None,
    k_rotation: Tensor | None = None,
) -> Tensor:
    """Torch truth of ``kv_append``."""
    q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
    if k_center is not None:
        k = k - k_center.to(torch.float32)
    if k_rotation is not None:
        q, k = _rotate(q, k_rotation), _rotate(k, k_rotation)
    keep = slots >= 0
    slots = slots[keep]
    page, offset = slots // pages.page_size, slots % pages.page_size
    _write(k[keep], pages.format.k_bits, page, offset, pages.k_codes, pages.k_scale, pages.k_offset)
    _write(v[keep], pages.format.v_bits, page, offset, pages.v_codes, pages.v_scale, pages.v_offset)
    return q


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    # fp64, so that rounding to fp32 hides the summation order, which depends on the batch size:
    # a token's key codes must not change with the chunk it arrives in.
    return (x.to(torch.float64) @ rotation.to(torch.float64)).to(torch.float32)


def _write(
    x: Tensor,
    bits: int,
    page: Tensor,
    offset: Tensor,
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor,
) -> None:
    """Put vectors x [T, Hkv, D] at (page, offset) [T] of one pages' half, K or V."""
    if bits == 16:
        codes[page, :, offset] = x.to(codes.dtype)
        return
    heads = quantize_heads(x, bits)
    codes[page, :, offset] = heads.codes
    scales[page, :, offset] = heads.scale
    offsets[page, :, offset] = heads.offset
