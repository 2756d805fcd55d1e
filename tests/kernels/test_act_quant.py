"""act_quant oracles against float64 formulas."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qoq.errors import BackendUnavailable
from qoq.formats.activation import QuantizedActivation
from qoq.kernels.act_quant import Activation, act_quant, rms_norm, rms_norm_quant, silu_mul_quant


def check(activation: Activation, want: Tensor, bits: int) -> None:
    """``activation`` stands for the float64 rows ``want``, to half a step (or fp32 rounding)."""
    if bits == 16:
        assert isinstance(activation, Tensor)
        assert activation.dtype == torch.float32
        torch.testing.assert_close(activation.double(), want, rtol=2e-5, atol=1e-6)
        return
    assert isinstance(activation, QuantizedActivation)
    assert activation.codes.dtype == torch.int8
    scale = want.abs().amax(-1) / 127
    torch.testing.assert_close(activation.scale.double(), scale, rtol=2e-5, atol=0)
    error = (activation.codes.double() * scale[:, None] - want).abs()
    assert (error <= 0.501 * scale[:, None] + 1e-7).all()
    assert torch.equal(activation.row_sum, activation.codes.sum(1, dtype=torch.int32))


def norm64(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain.double()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (40, 64)])
def test_act_quant(bits: int, shape: tuple[int, int]) -> None:
    x = torch.randn(shape) * 10
    check(act_quant(x, bits), x.double(), bits)


@given(
    m=st.integers(1, 9),
    k=st.integers(1, 130),
    bits=st.sampled_from([8, 16]),
    with_residual=st.booleans(),
    spread=st.floats(-3, 3),
)
def test_rms_norm_quant(m: int, k: int, bits: int, with_residual: bool, spread: float) -> None:
    x, gain = torch.randn(m, k) * 10**spread + 1, torch.rand(k) + 0.5
    residual = torch.randn(m, k) if with_residual else None
    activation, stream = rms_norm_quant(x, gain, 1e-5, bits, residual)
    total = x if residual is None else x + residual
    assert stream.dtype == torch.float32
    assert torch.equal(stream, total)
    check(activation, norm64(total, gain, 1e-5), bits)


@given(m=st.integers(1, 9), i=st.integers(1, 100), bits=st.sampled_from([8, 16]))
def test_silu_mul_quant(m: int, i: int, bits: int) -> None:
    gate_up = torch.randn(m, 2 * i) * 4
    gate, up = gate_up[:, :i].double(), gate_up[:, i:].double()
    check(silu_mul_quant(gate_up, bits), gate / (1 + torch.exp(-gate)) * up, bits)


def test_rms_norm_subtracts_no_mean_and_takes_any_lead() -> None:
    x, gain = torch.randn(2, 3, 4, 16) + 50, torch.rand(16)
    want = norm64(x, gain, 1e-6)
    torch.testing.assert_close(rms_norm(x, gain, 1e-6).double(), want, rtol=1e-5, atol=1e-6)


def test_epsilon_keeps_empty_rows_finite() -> None:
    activation, stream = rms_norm_quant(torch.zeros(2, 8), torch.ones(8), 1e-5, 8)
    assert isinstance(activation, QuantizedActivation)
    assert activation.codes.eq(0).all()
    assert activation.scale.eq(1).all()
    assert stream.eq(0).all()


@pytest.mark.parametrize("bits", [8, 16])
def test_no_rows(bits: int) -> None:
    shapes = [
        act_quant(torch.empty(0, 8), bits),
        rms_norm_quant(torch.empty(0, 8), torch.ones(8), 1e-5, bits)[0],
        silu_mul_quant(torch.empty(0, 16), bits),
    ]
    for out in shapes:
        codes = out.codes if isinstance(out, QuantizedActivation) else out
        assert codes.shape == (0, 8)


def test_a_row_does_not_know_its_batch() -> None:
    x, residual, gain = torch.randn(37, 384), torch.randn(37, 384), torch.rand(384)
    whole, stream = rms_norm_quant(x, gain, 1e-5, 8, residual)
    gated = silu_mul_quant(x, 8)
    assert isinstance(whole, QuantizedActivation)
    assert isinstance(gated, QuantizedActivation)
    for i in (0, 5, 36):
        row = slice(i, i + 1)
        alone, alone_stream = rms_norm_quant(x[row], gain, 1e-5, 8, residual[row])
        alone_gated = silu_mul_quant(x[row], 8)
        assert isinstance(alone, QuantizedActivation)
        assert isinstance(alone_gated, QuantizedActivation)
        assert torch.equal(alone_stream[0], stream[i])
        for one, all_ in ((alone, whole), (alone_gated, gated)):
            assert torch.equal(one.codes[0], all_.codes[i])
            assert torch.equal(one.scale[0], all_.scale[i])


def test_half_inputs_compute_in_fp32() -> None:
    x, gain = torch.randn(3, 32).half(), torch.rand(32).half()
    out, stream = rms_norm_quant(x, gain, 1e-5, 16)
    assert isinstance(out, Tensor)
    assert out.dtype == stream.dtype == torch.float32
    torch.testing.assert_close(out.double(), norm64(x, gain, 1e-5), rtol=1e-5, atol=1e-6)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="8 or 16"):
        act_quant(torch.ones(1, 2), 4)
    with pytest.raises(ValueError, match="equal"):
        silu_mul_quant(torch.ones(1, 3), 8)
    with pytest.raises(BackendUnavailable):
        act_quant(torch.ones(1, 2), 8, backend="gpu")


def test_a_norm_elsewhere_than_on_the_cpu_sums_in_fp64() -> None:
    """Else a row's bits would hang on how many there are, for so does torch's order on a GPU."""
    summed: list[torch.dtype] = []

    class Means(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func.overloadpacket in (torch.ops.aten.mean, torch.ops.aten.sum):
                summed.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    with Means():
        out = rms_norm(torch.empty(3, 8, device="meta"), torch.empty(8, device="meta"), 1e-5)
    assert summed == [torch.float64]
    assert out.dtype == torch.float32
