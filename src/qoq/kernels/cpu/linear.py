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
from qoq.kernels.cpu.backend import address, backend, extension
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
        out = torch.empty(m, n)
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
    at = {name: t.data_ptr() for name, t in parts.items()}  # ``parts`` keeps them alive
    if isinstance(weight, Int8Weight):
        tiles = kind.from_int8(n, k, at["codes"], at["scale"])
    elif isinstance(weight, ChannelWeight):
        tiles = kind.from_channels(n, k, at["codes"], at["scale"], at["offset"])
    else:
        group = weight.format.group_size
        names = ("codes", "channel_scale", "group_scale", "group_offset")
        tiles = kind.from_groups(n, k, group, *(at[name] for name in names))
    return TiledWeight(tiles, (n, k), weight.format)


def linear(x: QuantizedActivation, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """As the oracle, to the bit; a weight used more than once should be prepared first."""
    return prepare(weight).multiply(x, bias)


def unsupported(device: torch.device, **what: Any) -> str | None:
    """Why this call must be left to another twin, or None."""
    x, weight = what.get("x"), what.get("weight")
    if isinstance(x, Tensor) or isinstance(weight, Tensor):
        return "it multiplies int8 rows by packed weights only"
    if weight is not None and (weight.shape[1] % MULTIPLE or not weight.shape[1]):
        return f"{weight.shape[1]} input channels are no multiple of {MULTIPLE}"
    return unsupported_device(device)
