"""QuantizedActivation: int8 per token, symmetric, dynamic (QServe section 5; design section 2)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qoq.formats.affine import divided


@dataclass(frozen=True)
class QuantizedActivation:
    """A batch of token rows in int8; ``value = codes * scale``.

    codes int8 [M, K] in -127..127; scale fp32 [M] = absmax/127 (1 for all-zero rows);
    row_sum int32 [M] = exact sum of the codes (the per-channel linear's offset term needs it).
    """

    codes: Tensor
    scale: Tensor
    row_sum: Tensor

    def dequantize(self) -> Tensor:
        """fp32 [M, K]."""
        return self.codes.to(torch.float32) * self.scale[:, None]


def quantize_per_token(x: Tensor) -> QuantizedActivation:
    """Round each row of x [M, K] (any float dtype) to int8, half to even.

    The division is ``x / scale`` in fp32, so that every backend rounds the same numbers.
    """
    x = x.to(torch.float32)
    absmax = x.abs().amax(dim=-1) if x.shape[-1] else x.new_zeros(x.shape[0])
    scale = torch.where(absmax > 0, divided(absmax, 127), torch.ones_like(absmax))
    # A subnormal absmax can round its scale to 0 or push |x / scale| past 127: guard both ends.
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = (x / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    return QuantizedActivation(codes, scale, codes.sum(dim=-1, dtype=torch.int32))
