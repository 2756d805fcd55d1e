"""QServe's progressive groups to ours, exactly; and which of two scale orders a file is in.

QServe computes a level-1 weight as ``int8(code * s2_scale + s2_zero)`` with wrapping bytes, so its
stored zero may be off by a multiple of 256, and nothing in it bounds the scale. Ours never wraps:
scale 1..16, offset int8, and code * scale + offset in int8 (QServe section 4.1).
"""

from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from qoq.checkpoint.qserve_layout import ORDERS, ScaleOrder
from qoq.errors import CheckpointValueError
from qoq.formats.packing import pack_nibbles
from qoq.formats.progressive import INT8_MAX, INT8_MIN, MAX_GROUP_SCALE
from qoq.formats.weights import GroupWeight

_DECISIVE = 2.0  # how much worse balanced the wrong order must be
_FEW = 16  # groups whose balance may be chance


def unwrap_offsets(codes: Tensor, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """The offsets that were meant, and which groups leave int8 under any offset.

    codes uint8 [N, K/G, G]; scale and offset int32 [N, K/G], the offset modulo 256. Returns
    offset int32 [N, K/G] such that the lowest code in use has a value in int8, and bool [N, K/G].
    """
    low = codes.amin(-1).to(torch.int32) * scale + offset
    high = codes.amax(-1).to(torch.int32) * scale + offset
    turns = torch.div(low - INT8_MIN, 256, rounding_mode="floor") * 256
    return offset - turns, high - turns > INT8_MAX


def to_group_weight(
    name: str, codes: Tensor, channel_scale: Tensor, scale: Tensor, offset: Tensor
) -> GroupWeight:
    """Our weight for codes uint8 [N, K], scale and (wrapped) offset [N, K/G]: the same values.

    Where our bounds ask for it a group is written in other numbers that mean the same: codes
    shifted down to start at 0, or, for a scale beyond 16, a divisor of it. channel_scale fp32 [N];
    a row whose scale is 0 becomes zeros. Raises CheckpointValueError if a group leaves int8 or
    cannot be rewritten.
    """
    codes = codes.unflatten(1, (scale.shape[1], -1)).clone()
    scale, offset = scale.to(torch.int32, copy=True), offset.to(torch.int32, copy=True)
    dead = channel_scale == 0
    codes[dead], scale[dead], offset[dead] = 0, 1, 0
    channel_scale = torch.where(dead, torch.ones_like(channel_scale), channel_scale)
    if (scale < 0).any():
        raise CheckpointValueError(f"{name}.s2_scales holds a negative scale.")
    offset, overflows = unwrap_offsets(codes, scale, offset)
    if overflows.any():
        row, group = overflows.nonzero()[0].tolist()
        raise CheckpointValueError(
            f"{name}: {int(overflows.sum())} of {overflows.numel()} groups leave int8 (first: row "
            f"{row}, group {group}), so QServe's kernels would wrap. The file is damaged, or its "
            "group scales are in another order (see scale_order)."
        )
    # An offset below -128 is only reachable because low codes are not in use: start them at 0.
    shift = torch.where(offset < INT8_MIN, codes.amin(-1), torch.zeros_like(codes[..., 0]))
    codes -= shift.unsqueeze(-1)
    offset = offset + shift.to(torch.int32) * scale
    for row, group in ((scale < 1) | (scale > MAX_GROUP_SCALE)).nonzero().tolist():
        values = codes[row, group].to(torch.int32) * scale[row, group] + offset[row, group]
        rewritten = _rewrite(values)
        if rewritten is None:
            raise CheckpointValueError(
                f"{name}: row {row}, group {group} has scale {int(scale[row, group])}; scales end "
                f"at {MAX_GROUP_SCALE} here, and its values fit no smaller one."
            )
        codes[row, group], scale[row, group], offset[row, group] = rewritten
    return GroupWeight(
        pack_nibbles(codes.flatten(1)),
        channel_scale,
        scale.to(torch.uint8),
        offset.to(torch.int8),
    )


def _rewrite(values: Tensor) -> tuple[Tensor, int, int] | None:
    """Codes uint8, scale in 1..16 and offset that give exactly these int8 values [G], if any."""
    low, *rest = (int(v) for v in values.unique())
    step = gcd(*(v - low for v in rest))
    span = (rest[-1] if rest else low) - low
    for scale in range(1, MAX_GROUP_SCALE + 1):
        if step % scale == 0 and span <= 15 * scale:
            return ((values - low) // scale).to(torch.uint8), scale, low
    return None


@dataclass(frozen=True)
class OrderEvidence:
    """How plausible some weights are under each scale order; add up several linears' evidence.

    ``imbalance``: sum over groups of (mean value / scale)^2. Weights are balanced about 0, so a
    group's own zero cancels its mean code; a foreign one does not. ``overflows``: groups that
    leave int8, which the protective range rules out for the right order. Only the ``groups`` whose
    parameters differ between the orders are counted.
    """

    groups: int = 0
    imbalance: tuple[float, ...] = (0.0, 0.0)
    overflows: tuple[int, ...] = (0, 0)

    def __add__(self, other: "OrderEvidence") -> "OrderEvidence":
        return OrderEvidence(
            self.groups + other.groups,
            tuple(a + b for a, b in zip(self.imbalance, other.imbalance, strict=True)),
            tuple(a + b for a, b in zip(self.overflows, other.overflows, strict=True)),
        )

    def order(self) -> ScaleOrder | None:
        """The order the weights are in, None if they do not tell."""
        if not self.groups:
            return "kernel"  # both read the same
        for right, wrong in ((0, 1), (1, 0)) if self.groups >= _FEW else ():
            if self.imbalance[wrong] > _DECISIVE * self.imbalance[right]:
                return ORDERS[right]
        for right, wrong in ((0, 1), (1, 0)):
            if self.overflows[wrong] and not self.overflows[right]:
                return ORDERS[right]
        return None


def order_evidence(codes: Tensor, params: dict[ScaleOrder, tuple[Tensor, Tensor]]) -> OrderEvidence:
    """Evidence of one linear: codes uint8 [N, K]; order -> (scale, offset) [N, K/G] read so."""
    (first_scale, first_offset), (other_scale, other_offset) = (params[o] for o in ORDERS)
    differ = (first_scale != other_scale) | (first_offset != other_offset)
    grouped = codes.unflatten(1, (first_scale.shape[1], -1))[differ]
    mean = grouped.sum(-1, dtype=torch.int32) / grouped.shape[-1]
    imbalance, overflows = [], []
    for order in ORDERS:
        scale, offset = (p[differ].to(torch.int32) for p in params[order])
        offset, over = unwrap_offsets(grouped, scale, offset)
        residual = mean + offset / scale.clamp(min=1)
        imbalance.append(float(residual.square().sum()))
        overflows.append(int(over.sum()))
    return OrderEvidence(int(differ.sum()), tuple(imbalance), tuple(overflows))
