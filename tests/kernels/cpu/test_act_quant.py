"""C++ act_quant, rms_norm_quant, silu_mul_quant against their oracles."""

import os
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.activations import close, equal, random_rows
from qoq.formats.activation import QuantizedActivation
from qoq.kernels import act_quant as oracle
from qoq.kernels.cpu import act_quant as twin
from qoq.kernels.cpu import backend

WIDTHS = st.one_of(st.integers(1, 140), st.sampled_from([255, 256, 1000, 2048, 4099]))

pytestmark = pytest.mark.usefixtures("variant")


@given(m=st.integers(1, 12), k=WIDTHS, spread=st.sampled_from([0.0, 3.0, 30.0, 44.0]))
def test_act_quant_is_the_oracle(m: int, k: int, spread: float) -> None:
    x = random_rows(m, k, spread)
    half = x.clamp(-6e4, 6e4).half()
    for y in (x, x.contiguous(), half, x.t().contiguous().t()):
        equal(twin.act_quant(y, 8), oracle.act_quant_oracle(y, 8))
        equal(twin.act_quant(y, 16), oracle.act_quant_oracle(y, 16))


def test_ties_round_to_even_and_both_ends_are_reached() -> None:
    x = torch.arange(-254, 255).float()[None] / 2  # scale 1, every half among them
    got = twin.act_quant(x, 8)
    equal(got, oracle.act_quant_oracle(x, 8))
    assert isinstance(got, QuantizedActivation)
    assert got.codes.min() == -127
    assert got.codes.max() == 127


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 2.5e-43, 1.8e-43, 1e-38, 3e38, torch.inf])
def test_extreme_rows(value: float) -> None:
    x = torch.zeros(3, 37)
    x[1, 5], x[1, 36], x[2] = value, -value / 2, value
    finite = x.isfinite()
    got, want = twin.act_quant(x, 8), oracle.act_quant_oracle(x, 8)
    assert isinstance(got, QuantizedActivation)
    assert isinstance(want, QuantizedActivation)
    assert torch.equal(got.scale, want.scale)
    assert torch.equal(
        got.codes[finite], want.codes[finite]
    )  # inf / inf: torch's cast is undefined
    assert got.codes[~finite].eq(0).all()
    assert torch.equal(got.row_sum, got.codes.sum(1, dtype=torch.int32))


def test_nan_spoils_its_own_row_only() -> None:
    x = torch.randn(3, 50) * 20
    clean = twin.act_quant(x, 8)
    x[1, 7] = torch.nan
    got, want = twin.act_quant(x, 8), oracle.act_quant_oracle(x, 8)
    for out in (clean, got, want):
        assert isinstance(out, QuantizedActivation)
    assert torch.equal(got.scale, want.scale)
    known = ~x.isnan()
    assert torch.equal(got.codes[known], want.codes[known])
    assert got.codes[1, 7] == 0
    assert torch.equal(got.codes[::2], clean.codes[::2])


@given(
    m=st.integers(1, 9),
    k=WIDTHS,
    bits=st.sampled_from([8, 16]),
    with_residual=st.booleans(),
    spread=st.sampled_from([0.0, 2.0]),
)
def test_rms_norm_quant(m: int, k: int, bits: int, with_residual: bool, spread: float) -> None:
    x, gain = random_rows(m, k, spread) + 0.1, torch.rand(k) + 0.5
    residual = torch.randn(m, k) if with_residual else None
    before = x.clone()
    got, stream = twin.rms_norm_quant(x, gain, 1e-5, bits, residual)
    assert torch.equal(x, before)
    assert torch.equal(stream, oracle.rms_norm_quant_oracle(x, gain, 1e-5, bits, residual)[1])
    exact = stream.double()
    exact = exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain.double()
    close(got, exact, 1e-6, bits)


@given(m=st.integers(1, 9), k=WIDTHS, bits=st.sampled_from([8, 16]))
def test_silu_mul_quant(m: int, k: int, bits: int) -> None:
    gate_up = random_rows(m, 2 * k, 1.5)
    gate, up = gate_up.double().chunk(2, dim=1)
    close(twin.silu_mul_quant(gate_up, bits), gate * gate.sigmoid() * up, 1e-6, bits)


def test_silu_of_extreme_gates() -> None:
    gate = torch.tensor([-3e38, -1000.0, -104, -100, -88, -1e-40, 0, 1e-40, 88, 1000, 3e38])
    out = twin.silu_mul_quant(torch.cat((gate, torch.ones(11)))[None], 16)
    want = (gate.double() * gate.double().sigmoid())[None]
    torch.testing.assert_close(out.double(), want, rtol=1e-6, atol=1e-35)
    nan = twin.silu_mul_quant(torch.tensor([[torch.nan, 1.0, 1.0, 2.0]]), 16)
    assert nan.isnan().tolist() == [[True, False]]


def test_zero_rows_stay_finite() -> None:
    got, stream = twin.rms_norm_quant(torch.zeros(2, 8), torch.ones(8), 1e-5, 8)
    equal(got, oracle.act_quant_oracle(torch.zeros(2, 8), 8))
    assert stream.eq(0).all()


@pytest.mark.parametrize("k", [384, 5001])
def test_a_row_knows_neither_its_batch_nor_the_machine(k: int) -> None:
    """One instruction set is as good as another, and so is any number of threads: bit for bit."""
    x, residual, gain = torch.randn(37, k), torch.randn(37, k), torch.rand(k)

    def run(rows: slice) -> list[oracle.Activation]:
        out, stream = twin.rms_norm_quant(x[rows], gain, 1e-5, 16, residual[rows])
        return [out, stream, twin.silu_mul_quant(torch.cat((x, residual), 1)[rows], 16)]

    whole = run(slice(None))
    for i in (0, 5, 36):
        for one, all_ in zip(run(slice(i, i + 1)), whole, strict=True):
            assert torch.equal(one[0], all_[i])
    with patch.dict(os.environ, {"QOQ_ISA": "portable", "QOQ_NUM_THREADS": "1"}):
        backend.forget()
        slow = run(slice(None))
    backend.forget()
    for one, other in zip(slow, whole, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("k", [1, 15, 33, 64, 67])
def test_nothing_is_written_beyond_the_row(k: int) -> None:
    x = torch.randn(2, k)
    codes, scale = torch.full((2 * k + 64,), 99, dtype=torch.int8), torch.full((3,), -1.0)
    sums = torch.full((3,), 7, dtype=torch.int32)
    addresses = (codes.data_ptr(), scale.data_ptr(), sums.data_ptr(), 0)
    backend.extension().act_quant(backend.backend(), 2, k, x.data_ptr(), k, addresses)
    assert codes[2 * k :].eq(99).all()
    assert scale[2] == -1
    assert sums[2] == 7
    want = oracle.act_quant_oracle(x, 8)
    assert isinstance(want, QuantizedActivation)
    assert torch.equal(codes[: 2 * k].view(2, k), want.codes)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_empty(bits: int, shape: tuple[int, int]) -> None:
    x = torch.empty(shape)
    equal(twin.act_quant(x, bits), oracle.act_quant_oracle(x, bits))
    equal(twin.silu_mul_quant(x, bits), oracle.silu_mul_quant_oracle(x, bits))
    out, stream = twin.rms_norm_quant(x, torch.ones(shape[1]), 1e-5, bits)
    equal(out, oracle.rms_norm_quant_oracle(x, torch.ones(shape[1]), 1e-5, bits)[0])
    assert stream.shape == shape


def test_refusals() -> None:
    x, gain = torch.ones(2, 4), torch.ones(4)
    with pytest.raises(ValueError, match="8 or 16"):
        twin.act_quant(x, 4)
    with pytest.raises(ValueError, match="8 or 16"):
        twin.silu_mul_quant(x, 4)
    with pytest.raises(ValueError, match="equal"):
        twin.silu_mul_quant(torch.ones(1, 3), 8)
    with pytest.raises(ValueError, match=r"\[2, 4\]"):
        twin.rms_norm_quant(x, gain, 1e-5, 8, torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"\[4\]"):
        twin.rms_norm_quant(x, torch.ones(3), 1e-5, 8)
    with pytest.raises(ValueError, match="meta"):
        twin.act_quant(x.to("meta"), 8)
    assert twin.unsupported(torch.device("cpu")) is None
    assert "CPU" in str(twin.unsupported(torch.device("cuda")))
