"""C++ twin of linear: int8 rows times weights in tile order, equal to the oracle to the bit."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from qoq.errors import BackendUnavailable
from qoq.formats.activation import QuantizedActivation
from qoq.formats.scheme import WeightFormat
from qoq.formats.weights import ChannelWeight, Int8Weight, PackedWeight
from qoq.kernels.act_quant import Activation
from qoq.kernels.cpu.backend import CPU, address, backend, extension
from qoq.kernels.cpu.backend import unsupported as unsupported_device
from qoq.kernels.prepared import PreparedWeight

MULTIPLE = 32  # input channels of every format the kernels take


@dataclass(frozen=True)
class TiledWeight(PreparedWeight):
    """A weight [N, K] in the order the kernels read it; the canonical tensors are not kept."""

    backend: ClassVar[str] = "cpu"
    tiles: Any  # qoq._C.Tiles
    shape: tuple[int, int]
    format: WeightFormat

    def multiply(self, x: Activation, bias: Tensor | None) -> Tensor:
        if not isinstance(x, QuantizedActivation):
            raise BackendUnavailable(
                "Float rows cannot meet weights laid out for int8 rows; load the model with "
                "backend 'oracle' to run it in mixed precision."
            )
        (n, k), m = self.shape, x.codes.shape[0]
        if bias is not None:
            bias = bias.to(torch.float32)
        out = torch.empty(m, n, dtype=torch.float32, device=CPU)
        extension().linear(
            backend(),
            self.tiles,
            m,
            address(x.codes, torch.int8, m, k),
            address(x.scale, torch.float32, m),
            address(x.row_sum, torch.int32, m),
            0 if bias is None else address(bias, torch.float32, n),
            out.data_ptr(),
        )
        return out


def prepare(weight: PackedWeight) -> TiledWeight:
    """Canonical to tile order; takes about a nanosecond per byte."""
    kind, (n, k) = extension().Tiles, weight.shape
    parts = {name: t.contiguous() for name, t in weight.tensors().items()}

    def at(name: str, dtype: torch.dtype, columns: int | None = None) -> int:
        return address(parts[name], dtype, *([n] if columns is None else [n, columns]))

    if isinstance(weight, Int8Weight):
        tiles = kind.from_int8(n, k, at("codes", torch.int8, k), at("scale", torch.float32))
    elif isinstance(weight, ChannelWeight):
        scale, offset = at("scale", torch.float32), at("offset", torch.float32)
        tiles = kind.from_channels(n, k, at("codes", torch.uint8, k // 2), scale, offset)
    else:
        groups = weight.group_scale.shape[1]
        tiles = kind.from_groups(
            n,
            k,
            k // groups,
            at("codes", torch.uint8, k // 2),
            at("channel_scale", torch.float32),
            at("group_scale", torch.uint8, groups),
            at("group_offset", torch.int8, groups),
        )
    return TiledWeight(tiles, (n, k), weight.format)


def linear(x: QuantizedActivation, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """As the oracle, to the bit; a weight used more than once should be prepared first."""
    return prepare(weight).multiply(x, bias)


def unsupported(device: torch.device, **what: Any) -> str | None:
    """Why this call must be left to another twin, or None."""
    x, weight = what.get("x"), what.get("weight")
    if weight is not None and not isinstance(weight, Tensor) and not weight.codes.is_cpu:
        return f"the weight is on {weight.codes.device}"
    if isinstance(x, Tensor) or isinstance(weight, Tensor):
        return "it multiplies int8 rows by packed weights only"
    if weight is not None and (weight.shape[1] % MULTIPLE or not weight.shape[1]):
        return f"{weight.shape[1]} input channels are no multiple of {MULTIPLE}"
    return unsupported_device(device)
