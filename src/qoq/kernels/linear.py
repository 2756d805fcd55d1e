"""linear: int8 rows x packed weights -> float, exact in integers (QServe section 5.2; design 1.2).

int8 x int8 products accumulate exactly in int32, so the result up to the float epilogue is the
same to the bit on every backend, for every tiling and every batch. Only the epilogue rounds:

group and int8 weights   y = (acc * s_a) * s_w
per-channel 4-bit        y = s_a * (s_w * acc + offset * row_sum)   (offset leaves the main loop)
"""

import torch
from torch import Tensor

from qoq.errors import BackendUnavailable
from qoq.formats.weights import ChannelWeight, GroupWeight, PackedWeight
from qoq.kernels.act_quant import Activation
from qoq.kernels.dispatch import find, resolve
from qoq.kernels.prepared import PreparedWeight

# 128 * 128 * 1024 = 2**24: in chunks of this many terms every partial sum is an exact fp32 integer.
_EXACT_CHUNK = 1024


def linear(
    x: Activation,
    weight: PackedWeight | PreparedWeight | Tensor,
    bias: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """fp32 [M, N] = x [M, K] times weight [N, K] transposed (+ bias [N]).

    int8 rows x packed weight: exact integer accumulation, then the epilogue above. Where one side
    is float (W4A16, a 16-bit lm_head), the other is dequantized and torch multiplies in fp32. A
    prepared weight is multiplied by the twin that prepared it.
    """
    if isinstance(weight, PreparedWeight):
        if backend not in ("auto", weight.backend):
            raise BackendUnavailable(
                f"These weights were laid out for backend {weight.backend!r} when the model was "
                f"loaded; load it with backend {backend!r} to run it there."
            )
        return weight.multiply(x, bias)
    if isinstance(x, Tensor) or isinstance(weight, Tensor):
        return linear_oracle(x, weight, bias)
    run = resolve("linear", backend, x.codes.device, x=x, weight=weight)
    out: Tensor = run(x, weight, bias)
    return out


def prepare(weight: PackedWeight, backend: str = "auto") -> PackedWeight | PreparedWeight:
    """The weight in the layout of the twin that ``linear`` would take: once, at load.

    The oracle multiplies by the canonical weight, which then comes back as it is.
    """
    twin = find("linear", backend, weight.codes.device, weight=weight)
    if twin is None:
        return weight
    prepared: PreparedWeight = twin.prepare(weight)
    return prepared


def linear_oracle(
    x: Activation, weight: PackedWeight | Tensor, bias: Tensor | None = None
) -> Tensor:
    """Torch truth of ``linear``."""
    if isinstance(x, Tensor) or isinstance(weight, Tensor):
        rows = x.to(torch.float32) if isinstance(x, Tensor) else x.dequantize()
        matrix = weight.to(torch.float32) if isinstance(weight, Tensor) else weight.dequantize()
        out = rows @ matrix.T
    else:
        acc = int_matmul(x.codes, weight.int8()).to(torch.float32)
        if isinstance(weight, ChannelWeight):
            corrections = weight.offset * x.row_sum.to(torch.float32)[:, None]
            out = acc.mul_(weight.scale).add_(corrections).mul_(x.scale[:, None])
        else:
            scale = weight.channel_scale if isinstance(weight, GroupWeight) else weight.scale
            out = acc.mul_(x.scale[:, None]).mul_(scale)
    return out if bias is None else out.add_(bias.to(torch.float32))


def int_matmul(codes_a: Tensor, codes_w: Tensor) -> Tensor:
    """Exact int32 [M, N] = codes_a int8 [M, K] times codes_w int8 [N, K] transposed; K < 2**17.

    Three exact ways, the fastest that is safe: the int8 GEMM of a CPU with VNNI (without VNNI that
    GEMM may saturate 16-bit intermediates), else fp32 in chunks short enough to stay below 2**24,
    else (other devices, where fp32 may silently mean TF32) fp64.
    """
    m, k, n = codes_a.shape[0], codes_a.shape[1], codes_w.shape[0]
    if k != codes_w.shape[1]:
        raise ValueError(f"{k} activation columns do not meet {codes_w.shape[1]} weight columns")
    if not (m and n and k):
        return codes_a.new_zeros((m, n), dtype=torch.int32)
    if codes_a.device.type != "cpu":
        return (codes_a.to(torch.float64) @ codes_w.to(torch.float64).T).to(torch.int32)
    if k > 1 and _has_vnni():
        return torch._int_mm(_row_major(codes_a), _row_major(codes_w).T)
    return _chunked_matmul(codes_a, codes_w)


def _chunked_matmul(codes_a: Tensor, codes_w: Tensor) -> Tensor:
    """int_matmul by fp32 BLAS over K-chunks whose partial sums fp32 holds exactly."""
    acc = codes_a.new_zeros((codes_a.shape[0], codes_w.shape[0]), dtype=torch.int32)
    for start in range(0, codes_a.shape[1], _EXACT_CHUNK):
        a = codes_a[:, start : start + _EXACT_CHUNK].to(torch.float32)
        w = codes_w[:, start : start + _EXACT_CHUNK].to(torch.float32)
        acc += (a @ w.T).to(torch.int32)
    return acc


def _row_major(codes: Tensor) -> Tensor:
    # _int_mm takes leading dimensions from strides. Those of an axis of length 1 may be anything in
    # a contiguous tensor, and then it returns uninitialised memory: spell them out. (With K = 1 a
    # transposed operand cannot be told from a plain one, so that case never comes here.)
    return codes.contiguous().as_strided(codes.shape, (codes.shape[1], 1))


def _has_vnni() -> bool:
    # Without VNNI that GEMM saturates (and says nothing), so it must be known, not hoped for.
    # Older torch cannot tell; it then takes the fp32 way, which is right everywhere.
    ask = getattr(torch.cpu, "get_capabilities", None)
    return ask is not None and bool(ask().get("avx512_vnni", False))
