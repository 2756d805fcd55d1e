"""KV heads and pages: round trips and sizes."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qoq.formats.kv import KVPages, QuantizedHeads, dequantize_heads, page_bytes, quantize_heads
from qoq.formats.scheme import KVFormat


@given(
    bits=st.sampled_from([4, 8]),
    lead=st.sampled_from([(), (1,), (3, 2), (0, 4)]),
    half_dim=st.integers(1, 40),
    shift=st.floats(-200, 200),
)
def test_round_trip(bits: int, lead: tuple[int, ...], half_dim: int, shift: float) -> None:
    x = torch.randn(*lead, 2 * half_dim) * 5 + shift
    heads = quantize_heads(x, bits)
    assert heads.codes.shape == (*lead, 2 * half_dim * bits // 8)
    assert heads.codes.dtype == torch.uint8
    assert heads.scale.shape == heads.offset.shape == lead
    assert heads.scale.dtype == heads.offset.dtype == torch.float16
    back = dequantize_heads(heads, bits)
    assert back.dtype == torch.float32
    # Half a step, the minimum's fp16 rounding, and the rounded scale's shortfall at the top.
    scale, offset = heads.scale.float(), heads.offset.float()
    slack = 2**-10 * (offset.abs() + scale * 2**bits) + 1e-6
    assert ((back - x).abs() <= (scale / 2 + slack)[..., None]).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_values_on_the_grid_come_back_exactly(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (7, 3, 16))
    codes[..., 0], codes[..., 1] = 0, 2**bits - 1
    x = codes.float() * 0.25 - 3
    assert torch.equal(dequantize_heads(quantize_heads(x, bits), bits), x)


def test_nibbles_lie_along_the_head() -> None:
    x = torch.arange(16.0)[None]
    heads = quantize_heads(x, 4)
    assert heads.codes.tolist() == [[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]]
    assert (heads.scale.item(), heads.offset.item()) == (1, 0)


def test_constant_heads_are_exact() -> None:
    x = torch.full((2, 3, 8), -1.5)
    assert torch.equal(dequantize_heads(quantize_heads(x, 4), 4), x)


@pytest.mark.parametrize("bits", list(itertools.product((4, 8, 16), repeat=2)))
def test_pages_shapes_and_bytes(bits: tuple[int, int]) -> None:
    pages = KVPages.empty(KVFormat(*bits), 3, 2, 16, 8, dtype=torch.float16)
    assert (pages.num_pages, pages.page_size) == (3, 16)
    total = 0
    for side, n in zip(("k", "v"), bits, strict=True):
        codes = getattr(pages, f"{side}_codes")
        assert codes.shape == (3, 2, 16, 8 if n == 16 else 8 * n // 8)
        assert codes.dtype == (torch.float16 if n == 16 else torch.uint8)
        for name in ("scale", "offset"):
            qparam = getattr(pages, f"{side}_{name}")
            assert qparam.dtype == torch.float16
            assert qparam.shape == ((0,) if n == 16 else (3, 2, 16))
            total += qparam.nbytes
        total += codes.nbytes
    assert total == 3 * page_bytes(KVFormat(*bits), 2, 16, 8, float_bytes=2)


def test_kv4_is_a_quarter_of_fp16_and_its_scales() -> None:
    assert page_bytes(KVFormat(4, 4), 8, 16, 128) == 8 * 16 * 2 * (64 + 4)


def test_heads_are_plain_data() -> None:
    heads = QuantizedHeads(
        torch.tensor([[0x21]], dtype=torch.uint8),
        torch.tensor([0.5], dtype=torch.float16),
        torch.tensor([-1.0], dtype=torch.float16),
    )
    assert dequantize_heads(heads, 4).tolist() == [[-0.5, 0.0]]
    assert dequantize_heads(heads, 8).tolist() == [[0x21 * 0.5 - 1]]
