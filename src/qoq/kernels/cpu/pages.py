"""Addresses of pages, checked: what the kernels that read and write them are given."""

import torch
from torch import Tensor

from qoq.formats.kv import KVPages
from qoq.kernels.cpu.backend import address

Half = tuple[int, int, int, int]
"""Bits of K or V pages (floats: 16 for bf16, 32 for fp32), and the addresses of codes, scale and
offset (0 where there are none)."""

FLOATS = (torch.bfloat16, torch.float32)
"""What float pages may hold."""


def page_halves(pages: KVPages, kv_heads: int, dim: int) -> tuple[Half, Half]:
    """K and V of ``pages``, which must hold ``kv_heads`` heads of ``dim``."""
    shape = (pages.num_pages, kv_heads, pages.page_size)
    return (
        _half(pages.format.k_bits, pages.k_codes, pages.k_scale, pages.k_offset, shape, dim),
        _half(pages.format.v_bits, pages.v_codes, pages.v_scale, pages.v_offset, shape, dim),
    )


def unsupported_floats(pages: KVPages) -> str | None:
    """Why the kernels cannot read or write the float halves of ``pages``, or None."""
    for bits, codes in (
        (pages.format.k_bits, pages.k_codes),
        (pages.format.v_bits, pages.v_codes),
    ):
        if bits == 16 and codes.dtype not in FLOATS:
            return f"float pages must be bf16 or fp32, not {codes.dtype}"
    return None


def _half(
    bits: int, codes: Tensor, scale: Tensor, offset: Tensor, shape: tuple[int, int, int], dim: int
) -> Half:
    if bits == 16:
        dtype = codes.dtype
        if dtype not in FLOATS:
            raise ValueError(f"float pages must be bf16 or fp32, not {dtype}")
        return 8 * dtype.itemsize, address(codes, dtype, *shape, dim), 0, 0
    return (
        bits,
        address(codes, torch.uint8, *shape, dim * bits // 8),
        address(scale, torch.float16, *shape),
        address(offset, torch.float16, *shape),
    )
