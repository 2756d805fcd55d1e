"""Triton twin of linear: int8 rows times weights in tile order, exact in integers."""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import triton
from torch import Tensor

from qoq.errors import BackendUnavailable
from qoq.formats.activation import QuantizedActivation
from qoq.formats.scheme import WeightFormat
from qoq.formats.weights import PackedWeight
from qoq.kernels.act_quant import Activation
from qoq.kernels.gpu.backend import unsupported as unsupported_device
from qoq.kernels.gpu.product import product
from qoq.kernels.gpu.tiles import BAND, Tiles, tile
from qoq.kernels.gpu.tilings import LEAST_ROWS, MOST_TOKEN_TILES, Gpu, Shape, Tiling, choose
from qoq.kernels.prepared import PreparedWeight

MULTIPLE = 32  # input channels: rows of codes are read in whole vectors
LONGEST = 1 << 17  # input channels whose products of two bytes add up within int32
CROWD = 16  # tiles of tokens: with up to 128 tokens each, 2048 rows of codes stay in L2
INTERPRETED = not isinstance(product, triton.JITFunction)


@dataclass(frozen=True)
class GpuWeight(PreparedWeight):
    """A weight [N, K] in the order the kernel reads it; the canonical tensors are not kept.

    ``counters`` are zero between calls: two calls with one weight must not overlap in time, as
    they would on two streams.
    """

    backend: ClassVar[str] = "gpu"
    parts: Tiles
    counters: Tensor
    shape: tuple[int, int]
    format: WeightFormat

    def multiply(self, x: Activation, bias: Tensor | None) -> Tensor:
        if not isinstance(x, QuantizedActivation):
            raise BackendUnavailable(
                "Float rows cannot meet weights laid out for int8 rows; load the model with "
                "backend 'oracle' to run it in mixed precision."
            )
        out = x.codes.new_empty((x.codes.shape[0], self.shape[0]), dtype=torch.float32)
        return self.multiply_into(out, x, bias)

    def multiply_into(
        self,
        out: Tensor,
        x: QuantizedActivation,
        bias: Tensor | None = None,
        tiling: Tiling | None = None,
    ) -> Tensor:
        """``multiply`` into out [M, N], rounded to its dtype; int32 takes the exact sums, with no
        scale, offset or bias. Returns out. ``tiling``: another than the one chosen by shape.

        Allocates its workspace by torch and waits for nothing: it may be captured in a CUDA graph.
        """
        (n, k), m = self.shape, x.codes.shape[0]
        device = self.counters.device
        _check(device, x.codes, torch.int8, m, k)
        _check(device, x.scale, torch.float32, m)
        _check(device, x.row_sum, torch.int32, m)
        _check(device, out, out.dtype, m, n)
        if bias is not None:
            _check(device, bias, bias.dtype, n)
        if not (m and n):
            return out
        if tiling is None:
            tiling = choose(m, self.traits, gpu_of(device))
        outputs, bits = tiling.outputs(m, n, self.format.bits), self.format.bits
        partials = None
        if tiling.splits > 1:
            sums = (outputs, tiling.splits, tiling.channels(bits), tiling.tokens)
            partials = out.new_empty(sums, dtype=torch.int32)
        parts = self.parts
        product[outputs, tiling.splits](
            x.codes,
            x.scale,
            x.row_sum,
            parts.tiles,
            parts.groups,
            parts.scale,
            parts.offset,
            bias,
            out,
            partials,
            self.counters if partials is not None else None,
            m,
            N=n,
            K=k,
            PAIRED=bits == 4,
            BAND=BAND,
            WIDTH=parts.tiles.shape[3],
            ROWS=tiling.rows,
            TOKENS=tiling.tokens,
            SPLITS=tiling.splits,
            CROWD=CROWD,
            INTERPRETED=INTERPRETED,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
            enable_fp_fusion=False,  # the oracle rounds products before it adds
        )
        return out

    @property
    def traits(self) -> Shape:
        """What the choice of a tiling depends on."""
        return Shape(*self.shape, self.parts.tiles.shape[3], self.format.bits)


def prepare(weight: PackedWeight) -> GpuWeight:
    """Canonical to tile order, on the device where the weight lies."""
    parts = tile(weight)
    most = parts.tiles.shape[0] * (BAND // LEAST_ROWS) * MOST_TOKEN_TILES
    counters = parts.tiles.new_zeros(most, dtype=torch.int32)
    return GpuWeight(parts, counters, weight.shape, weight.format)


def linear(x: QuantizedActivation, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """As the oracle, to the bit; a weight used more than once should be prepared first."""
    return prepare(weight).multiply(x, bias)


def unsupported(device: torch.device, **what: Any) -> str | None:
    """Why this call must be left to another twin, or None."""
    x, weight = what.get("x"), what.get("weight")
    if isinstance(x, Tensor) or isinstance(weight, Tensor):
        return "it multiplies int8 rows by packed weights only"
    if weight is not None:
        if weight.codes.device != device:
            return f"the weight is on {weight.codes.device}"
        if weight.shape[1] % MULTIPLE or not 0 < weight.shape[1] < LONGEST:
            return f"{weight.shape[1]} input channels are no multiple of {MULTIPLE} below {LONGEST}"
    return unsupported_device(device)


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """The GPU as the choice of tilings sees it; the interpreter takes after an H200."""
    if device.type != "cuda":
        return Gpu((9, 0), 132, 228 << 10)
    have = torch.cuda.get_device_properties(device)
    return Gpu(
        (have.major, have.minor), have.multi_processor_count, have.shared_memory_per_multiprocessor
    )


def _check(device: torch.device, x: Tensor, dtype: torch.dtype, *shape: int) -> None:
    if x.dtype is not dtype or x.shape != shape or not x.is_contiguous() or x.device != device:
        raise ValueError(
            f"need a contiguous tensor {dtype} {list(shape)} on {device}, "
            f"not {x.dtype} {list(x.shape)} on {x.device} with strides {x.stride()}"
        )
