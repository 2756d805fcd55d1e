"""Triton twin of kv_append: pages and queries equal to the oracle's to the bit."""

import functools
from typing import Any

import torch
from torch import Tensor

from qoq.formats.kv import KVPages
from qoq.kernels.gpu.backend import unsupported as unsupported_device

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def unsupported(device: torch.device, *, pages: KVPages | None = None, **what: Any) -> str | None:
    """See ``dispatch.Twin``."""
    if pages is not None:
        for codes in (pages.k_codes, pages.v_codes):
            if codes.dtype != torch.uint8 and codes.dtype not in _FLOATS:
                return f"float pages must be bf16, fp16 or fp32, not {codes.dtype}"
    return unsupported_device(device)


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
) -> Tensor:
    """See ``qoq.kernels.kv_append``. Slots past the last page are not refused, which would wait
    for the GPU: they are left out, as -1 is.
    """
    tokens, heads, dim = q.shape
    kv_heads, pairs = k.shape[1], cos.shape[1]
    _check("k", k, (tokens, kv_heads, dim))
    _check("v", v, (tokens, kv_heads, dim))
    _check("cos", cos, (tokens, pairs))
    _check("sin", sin, (tokens, pairs))
    _check("slots", slots, (tokens,))
    if k_center is not None:
        _check("k_center", k_center, (kv_heads, dim))
        k_center = k_center.to(torch.float32).contiguous()
    if k_rotation is not None:
        _check("k_rotation", k_rotation, (dim, dim))
        k_rotation = k_rotation.contiguous()
    if 2 * pairs > dim:
        raise ValueError(f"{pairs} rotary pairs do not fit head_dim {dim}")
    k_bits, v_bits = pages.format.k_bits, pages.format.v_bits
    if dim % 2 and 4 in (k_bits, v_bits):
        raise ValueError(f"cannot pack {dim} nibbles: head_dim must be even")
    places = (pages.num_pages, kv_heads, pages.page_size)
    for name, bits in (("k", k_bits), ("v", v_bits)):
        codes = getattr(pages, f"{name}_codes")
        _check(f"{name}_codes", codes, (*places, dim if bits == 16 else dim * bits // 8))
        for part in (codes, getattr(pages, f"{name}_scale"), getattr(pages, f"{name}_offset")):
            if not part.is_contiguous():
                raise ValueError("pages must be contiguous")
    out = q.new_empty(q.shape, dtype=torch.float32)
    if not out.numel():
        return out
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    many = tokens >= 256 or k_rotation is not None
    block = 16 if many else 4
    _kernel()[-(-tokens // block), heads + kv_heads](
        q,
        k,
        v,
        cos.contiguous(),
        sin.contiguous(),
        slots.to(torch.int64).contiguous(),
        k_center,
        k_rotation,
        out,
        pages.k_codes,
        pages.k_scale,
        pages.k_offset,
        pages.v_codes,
        pages.v_scale,
        pages.v_offset,
        tokens,
        pages.num_pages * pages.page_size,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        PAIRS=pairs,
        PAGE=pages.page_size,
        K_BITS=k_bits,
        V_BITS=v_bits,
        WIDTH=1 << (dim - 1).bit_length(),
        TOKENS=block,
        num_warps=4 if many else 1,
        enable_fp_fusion=False,  # the oracle rounds products before it adds
    )
    return out


@functools.cache
def _kernel() -> Any:
    from qoq.kernels.gpu.append import append  # here, so that the module needs no Triton

    return append


def _check(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, not {list(x.shape)}")
