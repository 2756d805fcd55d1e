"""Triton twins of act_quant, rms_norm_quant and silu_mul_quant: one program per token row.

A row stays in registers between its reductions and its codes. Equal to the oracle to the bit, but
for the order in which RMSNorm sums squares and the last ulps of SiLU's exponential.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qoq.formats.activation import QuantizedActivation
from qoq.kernels import act_quant as oracle
from qoq.kernels.gpu.backend import unsupported as unsupported_device

MAX_COLUMNS = 32768  # what a program's registers hold (RMSNorm's spill a few from 16384 on)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unsupported(device: torch.device, **what: Any) -> str | None:
    """See ``dispatch.Twin``."""
    x, gate_up = what.get("x"), what.get("gate_up")
    columns = 0
    if x is not None:
        columns = x.shape[1]
    elif gate_up is not None:
        columns = gate_up.shape[1] // 2
    if columns > MAX_COLUMNS:
        return f"rows of {columns} numbers are longer than {MAX_COLUMNS}"
    return unsupported_device(device)


def act_quant(x: Tensor, bits: int) -> oracle.Activation:
    """See ``qoq.kernels.act_quant``."""
    if bits != 8 or not x.numel():
        return oracle.act_quant_oracle(x, bits)
    x = _rows(x)
    m, k = x.shape
    out = _Output(x, k, bits)
    act_quant_kernel[m,](x, x.stride(0), *out.tensors, k, QUANTIZE=out.quantize, **_launch(k))
    return out.activation


def rms_norm_quant(
    x: Tensor, gain: Tensor, eps: float, bits: int, residual: Tensor | None = None
) -> tuple[oracle.Activation, Tensor]:
    """See ``qoq.kernels.act_quant``."""
    if not x.numel():
        return oracle.rms_norm_quant_oracle(x, gain, eps, bits, residual)
    x = _rows(x)
    m, k = x.shape
    if gain.shape != (k,):
        raise ValueError(f"need a gain [{k}], not {list(gain.shape)}")
    out = _Output(x, k, bits)
    stream = x
    if residual is not None:
        residual = _rows(residual)
        if residual.shape != (m, k):
            raise ValueError(f"need a residual [{m}, {k}], not {list(residual.shape)}")
    if residual is not None or x.dtype != torch.float32:
        stream = torch.empty(m, k, dtype=torch.float32, device=x.device)
    rms_norm_quant_kernel[m,](
        x,
        x.stride(0),
        x if residual is None else residual,
        0 if residual is None else residual.stride(0),
        gain.contiguous(),
        stream,
        *out.tensors,
        k,
        eps,
        ADD=residual is not None,
        WRITE_STREAM=stream is not x,
        QUANTIZE=out.quantize,
        **_launch(k),
    )
    return out.activation, stream


def silu_mul_quant(gate_up: Tensor, bits: int) -> oracle.Activation:
    """See ``qoq.kernels.act_quant``."""
    if not gate_up.numel() or gate_up.shape[-1] % 2:
        return oracle.silu_mul_quant_oracle(gate_up, bits)
    gate_up = _rows(gate_up)
    m, k = gate_up.shape[0], gate_up.shape[1] // 2
    out = _Output(gate_up, k, bits)
    silu_mul_quant_kernel[m,](
        gate_up, gate_up.stride(0), *out.tensors, k, QUANTIZE=out.quantize, **_launch(k)
    )
    return out.activation


@triton.jit
def act_quant_kernel(
    x, stride, codes, scale, row_sum, floats, K, QUANTIZE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    values = _load(x + row * stride, columns, K)
    _write(values, row, columns, codes, scale, row_sum, floats, K, QUANTIZE)


@triton.jit
def rms_norm_quant_kernel(
    x,
    stride,
    residual,
    residual_stride,
    gain,
    stream,
    codes,
    scale,
    row_sum,
    floats,
    K,
    eps,
    ADD: tl.constexpr,
    WRITE_STREAM: tl.constexpr,
    QUANTIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    values = _load(x + row * stride, columns, K)
    if ADD:
        values += _load(residual + row * residual_stride, columns, K)
    if WRITE_STREAM:
        tl.store(stream + row * K + columns, values, mask=columns < K)
    # Not K.to(float): a K of 1 is compiled as a plain number.
    mean = tl.div_rn(tl.sum(values * values), K * 1.0)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    values = values * inverse * _load(gain, columns, K)
    _write(values, row, columns, codes, scale, row_sum, floats, K, QUANTIZE)


@triton.jit
def silu_mul_quant_kernel(
    gate_up, stride, codes, scale, row_sum, floats, K, QUANTIZE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    start = gate_up + row * stride
    gate, up = _load(start, columns, K), _load(start + K, columns, K)
    values = gate / (1.0 + tl.exp(-gate)) * up
    _write(values, row, columns, codes, scale, row_sum, floats, K, QUANTIZE)


@triton.jit
def _load(start, columns, K):
    return tl.load(start + columns, mask=columns < K, other=0.0).to(tl.float32)


@triton.jit
def _write(values, row, columns, codes, scale, row_sum, floats, K, QUANTIZE: tl.constexpr):
    """Put a row [BLOCK], 0 past its end, down as int8 codes with its scale and sum, or as it is."""
    inside = columns < K
    if QUANTIZE:
        # As integers, magnitudes order like numbers, and NaN lies above them all.
        magnitude = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        largest = tl.max(magnitude).to(tl.float32, bitcast=True)
        step = tl.where(largest > 0, tl.div_rn(largest, 127.0), 1.0)
        step = tl.where(step > 0, step, 1.0)
        ratio = tl.div_rn(values, step)
        # Adding 1.5 * 2^23 leaves no bits for a fraction: rounded half to even.
        rounded = tl.minimum(tl.maximum(ratio + 12582912.0 - 12582912.0, -127.0), 127.0)
        code = tl.where(ratio == ratio, rounded, 0.0).to(tl.int8)
        tl.store(codes + row * K + columns, code, mask=inside)
        tl.store(scale + row, step)
        tl.store(row_sum + row, tl.sum(code.to(tl.int32)))
    else:
        tl.store(floats + row * K + columns, values, mask=inside)


class _Output:
    """Room for an activation [m, k]; ``tensors`` are codes, scale, row_sum and floats as the
    kernels take them (what is not written may be any tensor).
    """

    def __init__(self, x: Tensor, k: int, bits: int) -> None:
        if bits not in (8, 16):
            raise ValueError(f"activations have 8 or 16 bits, not {bits}")
        m = x.shape[0]
        self.quantize = bits == 8
        self.activation: oracle.Activation
        if self.quantize:
            codes = torch.empty(m, k, dtype=torch.int8, device=x.device)
            scale = torch.empty(m, dtype=torch.float32, device=x.device)
            row_sum = torch.empty(m, dtype=torch.int32, device=x.device)
            self.activation = QuantizedActivation(codes, scale, row_sum)
            self.tensors = (codes, scale, row_sum, scale)
        else:
            floats = torch.empty(m, k, dtype=torch.float32, device=x.device)
            self.activation = floats
            self.tensors = (floats, floats, floats, floats)


def _rows(x: Tensor) -> Tensor:
    """x [M, K] in a dtype the kernels read, with no gaps inside rows; x itself if it is so."""
    if x.dtype not in _DTYPES:
        x = x.to(torch.float32)
    return x if x.stride(1) == 1 else x.contiguous()


def _launch(k: int) -> dict[str, int]:
    """Block size and warps: about 16 numbers a thread, up to the 1024 threads of a block."""
    block = triton.next_power_of_2(k)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}
