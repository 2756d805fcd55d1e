"""``value = code * scale + offset``: min/max affine codes along the last axis (KV cache, rows).

The one low-bit formula of the project. Scale and offset are rounded to the dtype they are stored
in *before* codes are chosen, so the codes are the best ones for the numbers that will be used.
"""

import torch
from torch import Tensor


def divided(x: Tensor, divisor: float) -> Tensor:
    """x / divisor, rounded once on every device: by a mere number torch does not divide on a GPU,
    it multiplies by its reciprocal.
    """
    return x / x.new_full((), divisor)


def affine_qparams(
    low: Tensor, high: Tensor, bits: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scale and offset of ``2**bits`` levels from low to high, both rounded to ``dtype``.

    A constant vector (or a range that vanishes in ``dtype``) gets scale 1, so all its codes are 0.
    Values beyond ``dtype``'s range are clamped to it rather than becoming infinite.
    """
    limit = torch.finfo(dtype).max
    levels = (1 << bits) - 1
    low32 = low.to(torch.float32).clamp(-limit, limit)
    high32 = high.to(torch.float32).clamp(-limit, limit)
    # Divide before subtracting: high - low may overflow what low and high themselves do not.
    scale = (divided(high32, levels) - divided(low32, levels)).clamp(max=limit).to(dtype)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale, low32.to(dtype)


def affine_codes(x: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    """Nearest codes (half to even), clamped to 0..2**bits-1; x [..., n], scale/offset [...]."""
    shifted = x.to(torch.float32) - offset.to(torch.float32).unsqueeze(-1)
    codes = (shifted / scale.to(torch.float32).unsqueeze(-1)).round_()
    return codes.clamp_(0, (1 << bits) - 1).to(torch.uint8)


def affine_quantize(
    x: Tensor, bits: int, dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [..., n] with scale, offset ``dtype`` [...], from min and max of x [..., n]."""
    scale, offset = affine_qparams(x.amin(dim=-1), x.amax(dim=-1), bits, dtype)
    return affine_codes(x, scale, offset, bits), scale, offset


def affine_dequantize(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """fp32 [..., n] = codes * scale + offset."""
    scale, offset = scale.to(torch.float32), offset.to(torch.float32)
    return codes.to(torch.float32) * scale.unsqueeze(-1) + offset.unsqueeze(-1)
