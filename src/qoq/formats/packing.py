"""Nibbles in bytes: the one place that orders them (element 2i low, 2i+1 high in byte i)."""

import torch
from torch import Tensor


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 codes [..., n] in 0..15, n even -> uint8 [..., n/2]."""
    if codes.shape[-1] % 2:
        raise ValueError(f"cannot pack {codes.shape[-1]} nibbles: the last axis must be even")
    codes = codes.to(torch.uint8)
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 [..., n/2] -> uint8 codes [..., n] in 0..15."""
    # Both nibbles of a byte part inside one (little-endian) 16-bit lane: no interleaving copy.
    lanes = packed.to(torch.int16).contiguous()
    return ((lanes | (lanes << 4)) & 0x0F0F).view(torch.uint8)
