"""Which values a weight may take: scales and offsets per format, with an optional range search.

A grid is fixed before rounding (static groups). The search shrinks either end of a row's or
group's range and keeps what costs least, errors weighted by the inputs' second moment (weight
clipping by output error, QServe section 4.3).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qoq.formats.packing import pack_nibbles
from qoq.formats.progressive import (
    channel_scales,
    group_codes,
    group_qparams,
    group_values,
    max_codes,
)
from qoq.formats.scheme import WeightFormat
from qoq.formats.weights import ChannelWeight, GroupWeight, Int8Weight, PackedWeight

# Fractions cut off either end of a range; the first must be 0 (no clipping).
GROUP_SHRINKS = tuple(0.07 * i for i in range(5))
CHANNEL_SHRINKS = tuple(0.025 * i for i in range(21))
SLICE_ELEMENTS = 1 << 17


@dataclass(frozen=True)
class Grid:
    """The values of a weight [N, K]: element (n, k) may be ``code*scale + offset``, code low..high.

    scale, offset, high: fp32 [N, S] with S columns shared by the input channels: channel k uses
    column ``share[k]`` (int64 [K]). S = 1 for per-channel formats, K/G for groups. The grid is
    static: it belongs to a channel, whatever order channels are rounded in.
    """

    scale: Tensor
    offset: Tensor
    high: Tensor
    share: Tensor
    low: float = 0.0

    def channels(self, order: Tensor) -> "Grid":
        """The grid of ``weight[:, order]``."""
        return Grid(self.scale, self.offset, self.high, self.share[order], self.low)

    def codes(self, weight: Tensor) -> Tensor:
        """Nearest codes, fp32 [N, K]."""
        codes = ((weight - self._spread(self.offset)) / self._spread(self.scale)).round_()
        return torch.minimum(codes, self._spread(self.high)).clamp_(min=self.low)

    def values(self, codes: Tensor) -> Tensor:
        """fp32 [N, K] of codes fp32 [N, K]."""
        return codes * self._spread(self.scale) + self._spread(self.offset)

    def _spread(self, t: Tensor) -> Tensor:
        return t if t.shape[1] == 1 else t[:, self.share]


@dataclass(frozen=True)
class GroupGrid(Grid):
    """Progressive groups: scale and offset are integers times channel_scale fp32 [N]."""

    channel_scale: Tensor = None  # type: ignore[assignment]
    group_scale: Tensor = None  # type: ignore[assignment]
    group_offset: Tensor = None  # type: ignore[assignment]


def make_grid(
    weight: Tensor, fmt: WeightFormat, importance: Tensor | None, search: bool = False
) -> Grid:
    """The grid of weight fp32 [N, K] in a 4- or 8-bit format.

    importance [K] (diagonal of the inputs' second moment; None: all equal) weighs the errors of
    the choice between candidates: floor or ceil group scales always, shrunk ranges if ``search``.
    """
    if importance is None:
        importance = weight.new_ones(weight.shape[1])
    if fmt.bits == 8:
        return _int8_grid(weight)
    if fmt.group_size:
        return _group_grid(weight, fmt.group_size, importance, search)
    return _channel_grid(weight, importance, search)


def pack(codes: Tensor, grid: Grid, fmt: WeightFormat) -> PackedWeight:
    """Codes fp32 [N, K] of a grid made for ``fmt`` -> what a checkpoint stores."""
    if fmt.bits == 8:
        return Int8Weight(codes.to(torch.int8), grid.scale[:, 0].contiguous())
    packed = pack_nibbles(codes.to(torch.uint8))
    if isinstance(grid, GroupGrid):
        return GroupWeight(packed, grid.channel_scale, grid.group_scale, grid.group_offset)
    return ChannelWeight(packed, grid.scale[:, 0].contiguous(), grid.offset[:, 0].contiguous())


def _share(weight: Tensor, size: int | None) -> Tensor:
    index = torch.arange(weight.shape[1], device=weight.device)
    return torch.zeros_like(index) if size is None else index // size


def _int8_grid(weight: Tensor) -> Grid:
    absmax = weight.abs().amax(dim=1, keepdim=True)
    scale = torch.where(absmax > 0, absmax / 127, torch.ones_like(absmax))
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = torch.zeros_like(scale)
    return Grid(scale, zero, torch.full_like(scale, 127), _share(weight, None), low=-127.0)


def _channel_grid(weight: Tensor, importance: Tensor, search: bool) -> Grid:
    parts = [_search_channels(rows, importance, search) for rows in _row_slices(weight)]
    scale, offset = (torch.cat(column) for column in zip(*parts, strict=True))
    return Grid(scale, offset, torch.full_like(scale, 15), _share(weight, None))


def _search_channels(weight: Tensor, importance: Tensor, search: bool) -> tuple[Tensor, Tensor]:
    """Best scale and offset fp32 [n, 1] of rows [n, K]."""
    low, high = weight.amin(dim=1, keepdim=True), weight.amax(dim=1, keepdim=True)
    share, top = _share(weight, None), torch.full_like(low, 15)
    best_scale, best_offset = torch.ones_like(low), low
    least = torch.full_like(low, torch.inf)
    for shrink in CHANNEL_SHRINKS if search else (0.0,):
        offset = low * (1 - shrink)
        scale = (high * (1 - shrink) - offset) / 15
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        grid = Grid(scale, offset, top, share)
        cost = ((grid.values(grid.codes(weight)) - weight).square() @ importance)[:, None]
        better = cost < least
        least = torch.where(better, cost, least)
        best_scale = torch.where(better, scale, best_scale)
        best_offset = torch.where(better, offset, best_offset)
    return best_scale, best_offset


def _group_grid(weight: Tensor, size: int, importance: Tensor, search: bool) -> Grid:
    channel = channel_scales(weight)
    weights = importance.reshape(-1, size)
    w8 = (weight / channel[:, None]).unflatten(1, (-1, size))  # [N, K/G, G]
    parts = [_search_groups(rows, weights, search) for rows in _row_slices(w8)]
    scale, offset = (torch.cat(column) for column in zip(*parts, strict=True))
    by = channel[:, None]
    return GroupGrid(
        scale.float() * by,
        offset.float() * by,
        max_codes(scale, offset).float(),
        _share(weight, size),
        0.0,
        channel,
        scale,
        offset,
    )


def _search_groups(w8: Tensor, importance: Tensor, search: bool) -> tuple[Tensor, Tensor]:
    """Best group_scale uint8 and group_offset int8 [n, K/G] of groups w8 [n, K/G, G]."""
    low, high = w8.amin(dim=-1), w8.amax(dim=-1)
    best_scale, best_offset = group_qparams(low, high, ceil=True)
    least = torch.full_like(low, torch.inf)
    shrinks = GROUP_SHRINKS if search else (0.0,)
    for a in shrinks:
        for b in shrinks:
            for ceil in (True, False):
                scale, offset = group_qparams(low * (1 - a), high * (1 - b), ceil=ceil)
                error = group_values(group_codes(w8, scale, offset), scale, offset) - w8
                cost = (error.square_() * importance).sum(dim=-1)
                better = cost < least
                least = torch.where(better, cost, least)
                best_scale = torch.where(better, scale, best_scale)
                best_offset = torch.where(better, offset, best_offset)
    return best_scale, best_offset


def _row_slices(weight: Tensor) -> tuple[Tensor, ...]:
    """Slices of rows that stay in a core's cache while a search goes over them many times."""
    rows = max(1, SLICE_ELEMENTS * len(weight) // max(1, weight.numel()))
    slices: tuple[Tensor, ...] = weight.split(rows)
    return slices
