"""Progressive two-level groups: int8 per channel over uint4 per group (QServe section 4.1).

Level 1: ``w8 = w / channel_scale`` must stay in +-119 (the protective range); it is *not* rounded.
Level 2: ``w8 ~ code * group_scale + group_offset`` with integers only, so that a GEMM can rebuild
int8 weights by one multiply and one add and never leave int8: range/15 rounded up is at most 16,
and a code rounds its value up by at most half a step, so 119 + 8 = 127. The exhaustive proof over
all (min, max) pairs is a test.
"""

import torch
from torch import Tensor

from qoq.formats.affine import divided

PROTECTIVE_RANGE = 119
INT8_MIN, INT8_MAX = -128, 127
MAX_GROUP_SCALE = 16


def channel_scales(weight: Tensor) -> Tensor:
    """Level-1 scale fp32 [N] of weight [N, K]: absmax / 119, 1 for all-zero rows."""
    absmax = weight.to(torch.float32).abs().amax(dim=-1)
    scale = divided(absmax, PROTECTIVE_RANGE)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def group_qparams(low: Tensor, high: Tensor, *, ceil: bool) -> tuple[Tensor, Tensor]:
    """Level-2 (group_scale uint8, group_offset int8) of groups spanning low..high in w8 units.

    ``ceil`` chooses between range/15 rounded up (no clipping) and rounded down (finer steps, the
    top clipped). The offset is the rounded minimum.
    """
    span = divided((high - low).to(torch.float64), 15)
    scale = torch.ceil(span) if ceil else torch.floor(span)
    offset = torch.round(low.to(torch.float64))
    scale = scale.clamp(1, MAX_GROUP_SCALE).to(torch.uint8)
    return scale, offset.clamp(INT8_MIN, INT8_MAX).to(torch.int8)


def max_codes(group_scale: Tensor, group_offset: Tensor) -> Tensor:
    """The largest code (0..15, int32) whose value stays in int8: floor((127 - offset)/scale)."""
    room = INT8_MAX - group_offset.to(torch.int32)
    return torch.div(room, group_scale.to(torch.int32), rounding_mode="floor").clamp(0, 15)


def group_codes(w8: Tensor, group_scale: Tensor, group_offset: Tensor) -> Tensor:
    """Nearest codes uint8 for real-valued w8 [N, K/G, G] under scale/offset [N, K/G]."""
    scale = group_scale.to(torch.float32).unsqueeze(-1)
    offset = group_offset.to(torch.float32).unsqueeze(-1)
    codes = ((w8.to(torch.float32) - offset) / scale).round_().clamp_(min=0)
    return torch.minimum(codes, max_codes(group_scale, group_offset).unsqueeze(-1)).to(torch.uint8)


def group_values(codes: Tensor, group_scale: Tensor, group_offset: Tensor) -> Tensor:
    """int32 w8 [N, K/G, G] = codes * scale + offset; not wrapped, so overflow can be seen."""
    scaled = codes.to(torch.int32) * group_scale.to(torch.int32).unsqueeze(-1)
    return scaled + group_offset.to(torch.int32).unsqueeze(-1)
