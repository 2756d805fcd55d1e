"""Tile order: nothing lost, nothing moved, and what cannot be multiplied is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.test_linear import KINDS, integer_weight, random_weight
from qoq.errors import CheckpointValueError
from qoq.formats.packing import pack_nibbles
from qoq.formats.weights import ChannelWeight, GroupWeight
from qoq.kernels.gpu import tiles as tiles_module
from qoq.kernels.gpu.tiles import BAND, Tiles, tile


def row(tiles: Tensor, of: int) -> Tensor:
    """All input channels of row ``of`` of bytes."""
    return tiles[of // BAND, :, of % BAND].flatten()


def integers(parts: Tiles, channel: int) -> Tensor:
    """int64 [K, padded]: what channel ``channel`` multiplies by, as the kernel reads it."""
    if parts.tiles.dtype == torch.int8:
        return row(parts.tiles, channel).long()
    band, place = divmod(channel, 2 * BAND)
    high, of = place // BAND, band * BAND + place % BAND
    codes = row(parts.tiles, of).long() >> 4 * high & 15
    if parts.groups is None:
        return codes ^ 8 * high
    words = row(parts.groups[..., None], of).long() >> 16 * high
    scale, offset = words & 255, (words >> 8 & 255) - 128
    width = parts.tiles.shape[3]
    return codes * scale.repeat_interleave(width) + offset.repeat_interleave(width)


@given(
    kind=st.sampled_from(KINDS),
    n=st.integers(1, 700),
    k=st.integers(1, 9).map(lambda count: 32 * count),
    chunk=st.integers(1, 3),
)
def test_every_channel_is_found_again(kind: str, n: int, k: int, chunk: int) -> None:
    group = int(kind.removeprefix("group")) if kind.startswith("group") else 1
    k = -(-k // group) * group
    weight = random_weight(kind, n, k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles_module, "_CHUNK", chunk)
        parts = tile(weight)
    want = integer_weight(weight)
    for channel in range(n):
        got = integers(parts, channel)
        assert torch.equal(got[:k], want[channel])
    tensors = weight.tensors()
    assert torch.equal(parts.scale[:n], tensors.get("scale", tensors.get("channel_scale")))
    assert not parts.scale[n:].any()
    if isinstance(weight, ChannelWeight):
        assert parts.offset is not None
        assert torch.equal(parts.offset[:n], weight.offset)


def test_a_step_of_a_program_is_one_run_of_memory() -> None:
    parts = tile(random_weight("group64", 300, 256))
    assert parts.tiles.shape == (2, 4, BAND, 64)
    assert parts.groups is not None
    assert parts.groups.shape == (2, 4, BAND)
    assert parts.tiles.is_contiguous()
    assert parts.groups.is_contiguous()
    assert tile(random_weight("channel", 257, 160)).tiles.shape == (2, 2, BAND, 128)
    assert tile(random_weight("int8", 257, 160)).tiles.shape == (3, 2, BAND, 128)


@pytest.mark.parametrize(("code", "scale", "offset"), [(15, 16, -112), (1, 1, 127), (0, 17, 0)])
def test_groups_that_leave_int8_are_refused(code: int, scale: int, offset: int) -> None:
    codes = torch.zeros(5, 64, dtype=torch.uint8)
    codes[3, 40] = code
    scales = torch.ones(5, 2, dtype=torch.uint8)
    offsets = torch.zeros(5, 2, dtype=torch.int8)
    scales[3, 1], offsets[3, 1] = scale, offset
    with pytest.raises(CheckpointValueError, match="quantize the model again"):
        tile(GroupWeight(pack_nibbles(codes), torch.ones(5), scales, offsets))
    offsets[3, 1] -= 1 if code else 0
    scales[3, 1] -= 0 if code else 1
    tile(GroupWeight(pack_nibbles(codes), torch.ones(5), scales, offsets))
