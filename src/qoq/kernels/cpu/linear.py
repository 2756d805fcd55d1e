"""C++ twin of linear: int8 rows times weights in tile order, equal to the oracle to the bit."""

import functools
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
    fp32, columns = torch.float32, {}
    if isinstance(weight, Int8Weight):
        make, columns = kind.from_int8, {"codes": (torch.int8, n, k), "scale": (fp32, n)}
    elif isinstance(weight, ChannelWeight):
        make, packed = kind.from_channels, (torch.uint8, n, k // 2)
        columns = {"codes": packed, "scale": (fp32, n), "offset": (fp32, n)}
    else:
        group = weight.format.group_size
        make, packed = functools.partial(kind.from_groups, group=group), (torch.uint8, n, k // 2)
        columns = {
            "codes": packed,
            "channel_scale": (fp32, n),
            "group_scale": (torch.uint8, n, k // group),
            "group_offset": (torch.int8, n, k // group),
        }
    parts = {name: t.contiguous() for name, t in weight.tensors().items()}
    at = {name: address(parts[name], *wanted) for name, wanted in columns.items()}
    tiles = make(n=n, k=k, **at)
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
