"""Packed weights in the order the GPU kernel reads them: pairs of rows in one byte.

A band is 128 rows of bytes; its input channels are cut into steps. ``tiles`` is
[bands, steps, 128, width]: what one step of one program reads is one run of memory. At 4 bits byte
(r, k) of band b holds two channels at the same k, so both meet the same activation:

    low nibble    channel 256 b + r
    high nibble   channel 256 b + 128 + r

and at 8 bits it is channel 128 b + r. The width of a step is that of a group, else 128.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qoq.errors import CheckpointValueError
from qoq.formats.packing import unpack_nibbles
from qoq.formats.progressive import INT8_MAX, MAX_GROUP_SCALE
from qoq.formats.weights import ChannelWeight, GroupWeight, Int8Weight, PackedWeight

BAND = 128
WIDTH = 128  # where there are no groups
_CHUNK = 16  # bands unpacked at a time


@dataclass(frozen=True)
class Tiles:
    """tiles uint8 (or int8) [bands, steps, 128, width]; scale fp32, of every channel of the bands.

    groups int32 [bands, steps, 128] = low scale | low offset + 128 << 8 and the same of the high
    channel << 16; offset fp32 like scale, of weights with one offset per channel. What a band has
    beyond the weight's channels is zero.
    """

    tiles: Tensor
    groups: Tensor | None
    scale: Tensor
    offset: Tensor | None


def tile(weight: PackedWeight) -> Tiles:
    """Canonical to tile order, on the weight's device.

    Raises CheckpointValueError if a code in use leaves int8: its byte would carry into another.
    """
    n, k = weight.shape
    if isinstance(weight, Int8Weight):
        rows = _padded(weight.codes, -n % BAND, -k % WIDTH)
        return Tiles(_steps(rows, WIDTH), None, _padded(weight.scale, -n % BAND), None)
    group = weight.format.group_size
    width = group or WIDTH
    extra, bands = -n % (2 * BAND), -(-n // (2 * BAND))
    tiles = torch.empty(
        bands, -(-k // width), BAND, width, dtype=torch.uint8, device=weight.codes.device
    )
    for start in range(0, bands, _CHUNK):
        some = slice(2 * BAND * start, 2 * BAND * (start + _CHUNK))
        codes = unpack_nibbles(weight.codes[some])
        if isinstance(weight, GroupWeight):
            _check(codes, weight.group_scale[some], weight.group_offset[some])
        codes = _padded(codes, -len(codes) % (2 * BAND), -k % width)
        low, high = codes.unflatten(0, (-1, 2, BAND)).unbind(1)
        if isinstance(weight, ChannelWeight):
            high = high ^ 8
        tiles[start : start + _CHUNK] = _steps((low | high << 4).flatten(0, 1), width)
    if isinstance(weight, ChannelWeight):
        return Tiles(tiles, None, _padded(weight.scale, extra), _padded(weight.offset, extra))
    offset = _padded(weight.group_offset, extra).to(torch.int32) + 128
    pair = _padded(weight.group_scale, extra).to(torch.int32) | offset << 8
    low, high = pair.unflatten(0, (bands, 2, BAND)).transpose(2, 3).unbind(1)
    return Tiles(tiles, (low | high << 16).contiguous(), _padded(weight.channel_scale, extra), None)


def _check(codes: Tensor, scale: Tensor, offset: Tensor) -> None:
    top = codes.unflatten(1, (scale.shape[1], -1)).amax(2).to(torch.int32)
    if (top * scale + offset > INT8_MAX).any() or (scale > MAX_GROUP_SCALE).any():
        raise CheckpointValueError(
            "A group of these weights leaves int8 (code * group_scale + group_offset > 127, or a "
            f"group_scale above {MAX_GROUP_SCALE}); quantize the model again or fetch it anew."
        )


def _padded(x: Tensor, rows: int, columns: int = 0) -> Tensor:
    pads = (0, columns, 0, rows) if x.dim() > 1 else (0, rows)
    return torch.nn.functional.pad(x, pads).contiguous()


def _steps(rows: Tensor, width: int) -> Tensor:
    """[bands * 128, steps * width] -> [bands, steps, 128, width]."""
    bands, steps = rows.shape[0] // BAND, rows.shape[1] // width
    return rows.view(bands, BAND, steps, width).transpose(1, 2).contiguous()
