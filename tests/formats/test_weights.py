"""Packed weights: dequantization by the book, stacking, names."""

import pytest
import torch
from torch import Tensor

from qoq.formats.packing import pack_nibbles
from qoq.formats.progressive import group_codes, group_qparams, group_values
from qoq.formats.scheme import WeightFormat
from qoq.formats.weights import ChannelWeight, GroupWeight, Int8Weight, PackedWeight, packed_type

N, K = 5, 128


def group_weight(group: int, n: int = N) -> tuple[GroupWeight, Tensor]:
    """A group weight and its codes [n, K/G, G]."""
    w8 = (torch.rand(n, K // group, group) * 2 - 1) * 119
    scale, offset = group_qparams(w8.amin(-1), w8.amax(-1), ceil=True)
    codes = group_codes(w8, scale, offset)
    return GroupWeight(pack_nibbles(codes.flatten(1)), torch.rand(n), scale, offset), codes


def channel_weight(n: int = N) -> ChannelWeight:
    codes = torch.randint(0, 16, (n, K), dtype=torch.uint8)
    return ChannelWeight(pack_nibbles(codes), torch.rand(n), torch.randn(n))


def int8_weight(n: int = N) -> Int8Weight:
    return Int8Weight(torch.randint(-127, 128, (n, K), dtype=torch.int8), torch.rand(n))


@pytest.mark.parametrize("group", [32, 64, 128])
def test_group_weight(group: int) -> None:
    weight, codes = group_weight(group)
    assert weight.shape == (N, K)
    assert weight.format == WeightFormat(4, group)
    want = group_values(codes, weight.group_scale, weight.group_offset).flatten(1)
    assert weight.int8().dtype == torch.int8
    assert torch.equal(weight.int8().int(), want)
    dense = weight.dequantize()
    for n, k in ((0, 0), (N - 1, K - 1), (2, group - 1), (3, K - group)):
        byte = int(weight.codes[n, k // 2])
        code = byte >> 4 if k % 2 else byte & 15
        g = k // group
        value = code * int(weight.group_scale[n, g]) + int(weight.group_offset[n, g])
        assert dense[n, k].item() == pytest.approx(value * weight.channel_scale[n].item())


def test_group_bytes_equal_int32_arithmetic_for_all_inputs() -> None:
    # Every scale, offset and code, even groups that a checkpoint may not hold: same wrapped byte.
    scale, offset = torch.meshgrid(torch.arange(1, 17), torch.arange(-128, 128), indexing="ij")
    scale, offset = scale.reshape(-1, 1).to(torch.uint8), offset.reshape(-1, 1).to(torch.int8)
    codes = torch.arange(16, dtype=torch.uint8).repeat(len(scale), 2)
    weight = GroupWeight(pack_nibbles(codes), torch.ones(len(scale)), scale, offset)
    want = group_values(codes[:, None], scale, offset).flatten(1).to(torch.int8)
    assert torch.equal(weight.int8(), want)


def test_channel_weight() -> None:
    weight = channel_weight()
    assert weight.shape == (N, K)
    assert weight.format == WeightFormat(4)
    codes = weight.int8()
    assert codes.dtype == torch.int8
    assert codes.min() >= 0
    assert codes.max() <= 15
    want = codes.double() * weight.scale.double()[:, None] + weight.offset.double()[:, None]
    torch.testing.assert_close(weight.dequantize().double(), want, rtol=1e-6, atol=1e-6)


def test_int8_weight() -> None:
    weight = int8_weight()
    assert weight.shape == (N, K)
    assert weight.format == WeightFormat(8)
    assert torch.equal(weight.dequantize(), weight.codes.float() * weight.scale[:, None])


@pytest.mark.parametrize("make", [lambda n: group_weight(64, n)[0], channel_weight, int8_weight])
def test_stacking_is_concatenation_of_rows(make) -> None:  # type: ignore[no-untyped-def]
    parts = [make(n) for n in (3, 1, 6)]
    whole = type(parts[0]).stack(parts)
    assert whole.shape == (10, K)
    assert torch.equal(whole.dequantize(), torch.cat([p.dequantize() for p in parts]))
    moved = whole.to("cpu")
    assert type(moved) is type(whole)
    assert torch.equal(moved.dequantize(), whole.dequantize())


def test_checkpoint_names() -> None:
    def names(weight: PackedWeight) -> list[str]:
        return list(weight.tensors())

    assert names(group_weight(32)[0]) == ["codes", "channel_scale", "group_scale", "group_offset"]
    assert names(channel_weight()) == ["codes", "scale", "offset"]
    assert names(int8_weight()) == ["codes", "scale"]


def test_packed_type() -> None:
    assert packed_type(WeightFormat(4, 128)) is GroupWeight
    assert packed_type(WeightFormat(4)) is ChannelWeight
    assert packed_type(WeightFormat(8)) is Int8Weight
    with pytest.raises(ValueError, match="16-bit"):
        packed_type(WeightFormat(16))
