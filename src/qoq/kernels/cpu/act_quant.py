"""C++ twins of act_quant, rms_norm_quant and silu_mul_quant.

Equal to the oracle to the bit, but for the order in which RMSNorm sums squares and the last ulp of
SiLU's exponential.
"""

from typing import Any

import torch
from torch import Tensor

from qoq.formats.activation import QuantizedActivation
from qoq.kernels import act_quant as oracle
from qoq.kernels.cpu.backend import CPU, address, backend, extension, row_address, rows
from qoq.kernels.cpu.backend import unsupported as unsupported_device


def unsupported(device: torch.device, **what: Any) -> str | None:
    """See ``dispatch.Twin``."""
    return unsupported_device(device)


def act_quant(x: Tensor, bits: int) -> oracle.Activation:
    """See ``qoq.kernels.act_quant``."""
    if bits != 8 or not x.numel():
        return oracle.act_quant_oracle(x, bits)
    x = rows(x)
    m, k = x.shape
    out, addresses = _outputs(m, k, bits)
    extension().act_quant(backend(), m, k, row_address(x, m, k), x.stride(0), addresses)
    return out


def rms_norm_quant(
    x: Tensor, gain: Tensor, eps: float, bits: int, residual: Tensor | None = None
) -> tuple[oracle.Activation, Tensor]:
    """See ``qoq.kernels.act_quant``."""
    if not x.numel():
        return oracle.rms_norm_quant_oracle(x, gain, eps, bits, residual)
    x, gain = rows(x), rows(gain)
    m, k = x.shape
    out, addresses = _outputs(m, k, bits)
    stream, residual_at, stride, stream_at = x, 0, 0, 0
    if residual is not None:
        residual = rows(residual)
        residual_at, stride = row_address(residual, m, k), residual.stride(0)
        stream = torch.empty(m, k, dtype=torch.float32, device=CPU)
        stream_at = stream.data_ptr()
    extension().rms_norm_quant(
        backend(),
        m,
        k,
        row_address(x, m, k),
        x.stride(0),
        residual_at,
        stride,
        address(gain, torch.float32, k),
        eps,
        stream_at,
        addresses,
    )
    return out, stream


def silu_mul_quant(gate_up: Tensor, bits: int) -> oracle.Activation:
    """See ``qoq.kernels.act_quant``."""
    if not gate_up.numel() or gate_up.shape[-1] % 2:
        return oracle.silu_mul_quant_oracle(gate_up, bits)
    gate_up = rows(gate_up)
    m, k = gate_up.shape
    out, addresses = _outputs(m, k // 2, bits)
    start = row_address(gate_up, m, k)
    extension().silu_mul_quant(backend(), m, k // 2, start, gate_up.stride(0), addresses)
    return out


def _outputs(m: int, k: int, bits: int) -> tuple[oracle.Activation, tuple[int, int, int, int]]:
    """Room for an activation [m, k], and the addresses of its codes, scale, row_sum and floats."""
    if bits == 16:
        floats = torch.empty(m, k, dtype=torch.float32, device=CPU)
        return floats, (0, 0, 0, floats.data_ptr())
    if bits != 8:
        raise ValueError(f"activations have 8 or 16 bits, not {bits}")
    codes = torch.empty(m, k, dtype=torch.int8, device=CPU)
    scale = torch.empty(m, dtype=torch.float32, device=CPU)
    row_sum = torch.empty(m, dtype=torch.int32, device=CPU)
    addresses = (codes.data_ptr(), scale.data_ptr(), row_sum.data_ptr(), 0)
    return QuantizedActivation(codes, scale, row_sum), addresses
