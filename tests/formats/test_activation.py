"""int8 per token: nearest codes, exact sums, rows that do not know of each other."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qoq.formats.activation import quantize_per_token


@given(m=st.integers(0, 5), k=st.integers(1, 70), spread=st.floats(-30, 30))
def test_codes_scale_and_sum(m: int, k: int, spread: float) -> None:
    x = torch.randn(m, k) * 10**spread
    q = quantize_per_token(x)
    assert q.codes.dtype == torch.int8
    assert q.scale.dtype == torch.float32
    assert q.row_sum.dtype == torch.int32
    assert q.codes.shape == (m, k)
    assert q.scale.shape == q.row_sum.shape == (m,)
    assert q.codes.int().abs().le(127).all()
    assert q.row_sum.tolist() == [sum(row) for row in q.codes.tolist()]
    error = (q.codes.double() * q.scale.double()[:, None] - x.double()).abs()
    assert (error <= 0.5001 * q.scale.double()[:, None]).all()
    assert torch.equal(q.dequantize(), q.codes.float() * q.scale[:, None])


def test_peak_is_127() -> None:
    x = torch.randn(50, 33)
    peaks = quantize_per_token(x).codes.int().abs().amax(1)
    assert peaks.eq(127).all()


def test_half_goes_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert quantize_per_token(x).codes.tolist() == [[127, 0, 2, 2, 0, -2]]


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 1e-39])
def test_rows_too_small_to_scale(value: float) -> None:
    q = quantize_per_token(torch.full((1, 4), value))
    assert q.scale.item() > 0
    assert q.dequantize().isfinite().all()
    if value == 0:
        assert q.scale.item() == 1


def test_rows_are_independent() -> None:
    x = torch.randn(9, 300)
    whole = quantize_per_token(x)
    for i in range(9):
        alone = quantize_per_token(x[i : i + 1])
        assert torch.equal(alone.codes[0], whole.codes[i])
        assert alone.scale[0] == whole.scale[i]


def test_half_precision_inputs_are_widened_first() -> None:
    x = torch.randn(4, 40).to(torch.bfloat16)
    a, b = quantize_per_token(x), quantize_per_token(x.float())
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.scale, b.scale)


def test_no_columns() -> None:
    q = quantize_per_token(torch.empty(2, 0))
    assert q.scale.tolist() == [1.0, 1.0]
    assert q.row_sum.tolist() == [0, 0]
