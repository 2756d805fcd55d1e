"""act_quant: token rows to int8, alone, after (add +) RMSNorm, or after SiLU-mul (QServe 5.2.1).

Each row is quantized on its own (symmetric, dynamic: scale = absmax/127), so a token's codes never
depend on the rest of the batch. ``bits=16`` means "not quantized": the fp32 rows come back as they
are, so that callers need no branch on precision.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from qoq.formats.activation import QuantizedActivation, quantize_per_token
from qoq.kernels.dispatch import resolve

Activation = QuantizedActivation | Tensor
"""What enters a linear: int8 rows, or a plain fp32 Tensor [M, K] where activations are 16-bit."""


def act_quant(x: Tensor, bits: int, *, backend: str = "auto") -> Activation:
    """x [M, K] any float -> int8 codes with a scale per row (bits 8) or x in fp32 (bits 16)."""
    if bits == 16:
        return act_quant_oracle(x, bits)
    run = resolve("act_quant", backend, x.device, bits=bits, x=x)
    out: Activation = run(x, bits)
    return out


def rms_norm_quant(
    x: Tensor,
    gain: Tensor,
    eps: float,
    bits: int,
    residual: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Activation, Tensor]:
    """Add, normalize, quantize: r = x (+ residual), act_quant(RMSNorm(r) * gain).

    x, residual [M, K]; gain [K]. Returns (the activation [M, K], r fp32 [M, K]); r is the residual
    stream for the next add and may share memory with x when no residual is given.
    """
    run = resolve("rms_norm_quant", backend, x.device, bits=bits, x=x)
    out: tuple[Activation, Tensor] = run(x, gain, eps, bits, residual)
    return out


def silu_mul_quant(gate_up: Tensor, bits: int, *, backend: str = "auto") -> Activation:
    """gate_up [M, 2I] = gate beside up -> act_quant(SiLU(gate) * up), [M, I]."""
    run = resolve("silu_mul_quant", backend, gate_up.device, bits=bits, gate_up=gate_up)
    out: Activation = run(gate_up, bits)
    return out


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """fp32 [..., K] = x / sqrt(mean(x^2) + eps) * gain, per last axis; no mean is subtracted."""
    x = x.to(torch.float32)
    # How torch sums on a GPU hangs on the number of rows; in fp64 no order survives rounding.
    exact = x if x.device.type == "cpu" else x.to(torch.float64)
    mean = exact.square().mean(dim=-1, keepdim=True).to(torch.float32)
    inverse = torch.rsqrt(mean + eps)
    return x * inverse * gain.to(torch.float32)


def act_quant_oracle(x: Tensor, bits: int) -> Activation:
    """Torch truth of ``act_quant``."""
    if bits == 16:
        return x.to(torch.float32)
    if bits != 8:
        raise ValueError(f"activations have 8 or 16 bits, not {bits}")
    return quantize_per_token(x)


def rms_norm_quant_oracle(
    x: Tensor, gain: Tensor, eps: float, bits: int, residual: Tensor | None = None
) -> tuple[Activation, Tensor]:
    """Torch truth of ``rms_norm_quant``."""
    stream = x.to(torch.float32)
    if residual is not None:
        stream = stream + residual.to(torch.float32)
    return act_quant_oracle(rms_norm(stream, gain, eps), bits), stream


def silu_mul_quant_oracle(gate_up: Tensor, bits: int) -> Activation:
    """Torch truth of ``silu_mul_quant``."""
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up has {gate_up.shape[-1]} columns: gate and up must be equal")
    gate, up = gate_up.to(torch.float32).chunk(2, dim=-1)
    return act_quant_oracle(F.silu(gate) * up, bits)
