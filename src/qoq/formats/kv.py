"""KVPages: one layer's paged KV cache as it lies in memory (QServe section 5.3; design section 2).

HND pages: [num_pages, num_kv_heads, page_size, ...], so one head's page is contiguous. 4-bit codes
are nibble-packed along head_dim, 8-bit codes are bytes, 16 means float values without scales: bf16
where speed counts, fp32 where they are the reference.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from qoq.formats.affine import affine_dequantize, affine_quantize
from qoq.formats.packing import pack_nibbles, unpack_nibbles
from qoq.formats.scheme import KVFormat


@dataclass(frozen=True)
class QuantizedHeads:
    """Head vectors in low precision: codes [..., D*bits/8] uint8, scale and offset fp16 [...]."""

    codes: Tensor
    scale: Tensor
    offset: Tensor


def quantize_heads(x: Tensor, bits: int) -> QuantizedHeads:
    """x [..., D] -> codes per token and head, from each vector's own min and max; bits 4 or 8."""
    codes, scale, offset = affine_quantize(x, bits)
    return QuantizedHeads(pack_nibbles(codes) if bits == 4 else codes, scale, offset)


def dequantize_heads(heads: QuantizedHeads, bits: int) -> Tensor:
    """fp32 [..., D]."""
    codes = unpack_nibbles(heads.codes) if bits == 4 else heads.codes
    return affine_dequantize(codes, heads.scale, heads.offset)


@dataclass(frozen=True)
class KVPages:
    """One layer's pages.

    k_codes, v_codes: uint8 [P, Hkv, page_size, D*bits/8] (bits 4, 8) or float
    [P, Hkv, page_size, D] (bits 16); k_scale, k_offset, v_scale, v_offset: fp16
    [P, Hkv, page_size] (empty for 16 bits). A slot is ``page * page_size + offset in page``.
    """

    format: KVFormat
    k_codes: Tensor
    k_scale: Tensor
    k_offset: Tensor
    v_codes: Tensor
    v_scale: Tensor
    v_offset: Tensor

    @property
    def num_pages(self) -> int:
        return self.k_codes.shape[0]

    @property
    def page_size(self) -> int:
        return self.k_codes.shape[2]

    @classmethod
    def empty(
        cls,
        format: KVFormat,
        num_pages: int,
        num_kv_heads: int,
        page_size: int,
        head_dim: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Zeroed pages; ``dtype`` is that of 16-bit (unquantized) entries only."""
        shape = (num_pages, num_kv_heads, page_size)

        def codes(bits: int) -> Tensor:
            if bits == 16:
                return torch.zeros(*shape, head_dim, dtype=dtype, device=device)
            return torch.zeros(*shape, head_dim * bits // 8, dtype=torch.uint8, device=device)

        def qparams(bits: int) -> Tensor:
            return torch.zeros((0,) if bits == 16 else shape, dtype=torch.float16, device=device)

        k, v = format.k_bits, format.v_bits
        return cls(format, codes(k), qparams(k), qparams(k), codes(v), qparams(v), qparams(v))


def page_bytes(
    format: KVFormat, num_kv_heads: int, page_size: int, head_dim: int, float_bytes: int = 4
) -> int:
    """Bytes of one layer's page, K and V, codes and fp16 scale + offset."""

    def per_vector(bits: int) -> int:
        return head_dim * float_bytes if bits == 16 else head_dim * bits // 8 + 4

    return num_kv_heads * page_size * (per_vector(format.k_bits) + per_vector(format.v_bits))
