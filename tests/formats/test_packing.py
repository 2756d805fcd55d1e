"""Nibble order is a byte-for-byte promise."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qoq.formats.packing import pack_nibbles, unpack_nibbles


def test_golden_bytes() -> None:
    codes = torch.tensor([1, 2, 15, 0, 0, 15, 8, 7], dtype=torch.uint8)
    assert pack_nibbles(codes).tolist() == [0x21, 0x0F, 0xF0, 0x78]


def test_every_byte_survives() -> None:
    packed = torch.arange(256, dtype=torch.uint8)
    codes = unpack_nibbles(packed)
    assert codes.tolist() == [n for byte in range(256) for n in (byte & 15, byte >> 4)]
    assert torch.equal(pack_nibbles(codes), packed)


@given(st.lists(st.integers(1, 3), max_size=3), st.integers(0, 9))
def test_round_trip(lead: list[int], half: int) -> None:
    codes = torch.randint(0, 16, (*lead, 2 * half), dtype=torch.uint8)
    packed = pack_nibbles(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*lead, half)
    assert torch.equal(unpack_nibbles(packed), codes)


def test_strided_views_unpack() -> None:
    packed = torch.randint(0, 256, (6, 10), dtype=torch.uint8)
    for view in (packed.T, packed[::2], packed[:, 1:7], packed[:, ::3]):
        assert torch.equal(unpack_nibbles(view), unpack_nibbles(view.clone().contiguous()))
        assert torch.equal(pack_nibbles(unpack_nibbles(view)), view)


def test_odd_length_is_refused() -> None:
    with pytest.raises(ValueError, match="even"):
        pack_nibbles(torch.zeros(3, dtype=torch.uint8))
