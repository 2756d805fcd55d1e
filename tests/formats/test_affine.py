"""``code * scale + offset``: the stored numbers are rounded first, then the codes are the best."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qoq.formats.affine import affine_codes, affine_dequantize, affine_qparams, affine_quantize


def assert_best_codes(x: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, bits: int) -> None:
    """No other code comes nearer under the scale and offset that were stored."""
    every = torch.arange(2**bits, dtype=torch.float64)
    values = every * scale.double()[..., None] + offset.double()[..., None]
    errors = (x.double()[..., None] - values[..., None, :]).abs()
    chosen = errors.gather(-1, codes.long()[..., None])[..., 0]
    slack = 1e-6 * (scale.double() + x.double().abs().amax(-1))[..., None]
    assert (chosen <= errors.amin(-1) + slack).all()


@given(
    bits=st.sampled_from([4, 8]),
    shape=st.sampled_from([(1, 1), (3, 2), (2, 3, 17), (5, 64)]),
    spread=st.floats(-6, 4),
    shift=st.floats(-300, 300),
)
def test_codes_are_the_nearest(
    bits: int, shape: tuple[int, ...], spread: float, shift: float
) -> None:
    x = torch.randn(shape) * 10**spread + shift
    codes, scale, offset = affine_quantize(x, bits)
    assert codes.dtype == torch.uint8
    assert codes.int().max() < 2**bits
    assert scale.dtype == offset.dtype == torch.float16
    assert (scale > 0).all()
    assert_best_codes(x, codes, scale, offset, bits)
    want = codes.double() * scale.double()[..., None] + offset.double()[..., None]
    torch.testing.assert_close(
        affine_dequantize(codes, scale, offset).double(), want, rtol=1e-6, atol=1e-6
    )


def test_codes_follow_the_rounded_scale_not_the_exact_one() -> None:
    x = torch.randn(4000, 16) * 7
    codes, scale, offset = affine_quantize(x, 8)
    assert_best_codes(x, codes, scale, offset, 8)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    naive = ((x - low) / ((high - low) / 255)).round().clamp(0, 255).to(torch.uint8)
    assert (naive != codes).any(), "the test cannot tell the two apart"


@pytest.mark.parametrize("value", [0.0, 1.0, -3.140625, 5.5e4, -1e-7])
@pytest.mark.parametrize("bits", [4, 8])
def test_constant_vectors(value: float, bits: int) -> None:
    codes, scale, offset = affine_quantize(torch.full((2, 8), value), bits)
    assert codes.eq(0).all()
    assert scale.eq(1).all()
    assert offset.eq(torch.tensor(value, dtype=torch.float16)).all()


def test_a_range_too_small_for_fp16_counts_as_constant() -> None:
    x = torch.tensor([[0.0, 1e-8]])
    codes, scale, _ = affine_quantize(x, 4)
    assert scale.item() == 1
    assert codes.eq(0).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_huge_values_are_clamped_not_infinite(bits: int) -> None:
    x = torch.tensor([[-1e30, 0.0, 1e30], [3e38, 3.1e38, 3.2e38], [-7e4, -6.6e4, 1.0]])
    codes, scale, offset = affine_quantize(x, bits)
    assert scale.isfinite().all()
    assert offset.isfinite().all()
    assert affine_dequantize(codes, scale, offset).isfinite().all()
    assert codes[0].tolist()[0] == 0
    assert codes[0].tolist()[2] == 2**bits - 1
    # The largest representable range survives whole.
    top = affine_dequantize(codes, scale, offset)[0]
    assert top[0] == -65504
    assert abs(top[2] - 65504) < 65504 / 2**bits


def test_other_dtypes_for_scale_and_offset() -> None:
    x = torch.randn(3, 5)
    for dtype in (torch.float32, torch.bfloat16):
        codes, scale, offset = affine_quantize(x, 4, dtype)
        assert scale.dtype == offset.dtype == dtype
        assert_best_codes(x, codes, scale, offset, 4)


def test_qparams_take_any_range() -> None:
    low, high = torch.tensor([-2.0, 5.0]), torch.tensor([13.0, 5.0])
    scale, offset = affine_qparams(low, high, 4, torch.float16)
    assert scale.tolist() == [1.0, 1.0]
    assert offset.tolist() == [-2.0, 5.0]
    codes = affine_codes(torch.tensor([[-9.0, -0.6, 99.0], [5.0, 5.0, 5.0]]), scale, offset, 4)
    assert codes.tolist() == [[0, 1, 15], [0, 0, 0]]


def test_ties_go_to_the_even_code() -> None:
    x = torch.tensor([[0.0, 0.5, 1.5, 2.5, 15.0]])
    assert affine_quantize(x, 4)[0].tolist() == [[0, 0, 2, 2, 15]]


def test_empty_batch() -> None:
    codes, scale, offset = affine_quantize(torch.empty(0, 3, 8), 4)
    assert codes.shape == (0, 3, 8)
    assert scale.shape == offset.shape == (0, 3)
