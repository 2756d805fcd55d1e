"""Comparing twins of act_quant with their oracle."""

import torch
from torch import Tensor

from qoq.formats.activation import QuantizedActivation
from qoq.kernels.act_quant import Activation


def equal(got: Activation, want: Activation) -> None:
    """Every tensor the same, to the bit."""
    if isinstance(want, Tensor):
        assert isinstance(got, Tensor)
        assert torch.equal(got, want)
        return
    assert isinstance(got, QuantizedActivation)
    for name, tensor in vars(want).items():
        assert getattr(got, name).dtype == tensor.dtype, name
        assert torch.equal(getattr(got, name), tensor), name


def close(got: Activation, want: Tensor, rtol: float, bits: int) -> None:
    """``got`` stands for the float64 rows ``want``, known to ``rtol``, to half a step."""
    if bits == 16:
        assert isinstance(got, Tensor)
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=1e-34)
        return
    assert isinstance(got, QuantizedActivation)
    scale = want.abs().amax(-1) / 127
    torch.testing.assert_close(got.scale.double(), scale, rtol=rtol, atol=1e-34)
    steps = got.codes.double() - want / scale[:, None]
    assert (steps.abs() <= 0.5 + 127 * rtol).all()
    assert torch.equal(got.row_sum, got.codes.sum(1, dtype=torch.int32))


def random_rows(m: int, k: int, spread: float) -> Tensor:
    """Finite rows of very different sizes, with zeros, inside a wider matrix (no copy)."""
    wide = torch.randn(m, k + 3) * 10 ** (torch.rand(m, 1) * 2 * spread - spread)
    wide.clamp_(-3e38, 3e38)
    wide[:, ::5] = 0
    return wide[:, 2 : 2 + k]
