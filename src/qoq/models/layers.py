"""Linear: a weight of any format with its bias, and how its tensors are found in a checkpoint."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from qoq.formats.scheme import WeightFormat
from qoq.formats.weights import PackedWeight, packed_type
from qoq.kernels.act_quant import Activation
from qoq.kernels.linear import linear, prepare
from qoq.kernels.prepared import PreparedWeight

Get = Callable[[str], Tensor]
"""Returns a tensor by its checkpoint name."""


@dataclass(frozen=True)
class Linear:
    """``y = x @ weight.T + bias``; weight packed, prepared or fp32 [N, K], bias fp32 [N] or None.

    ``act_bits`` says what must enter: 8 for int8 rows, 16 for float rows. Whoever makes the input
    (a norm, SiLU-mul) reads it there, so precision stays a property of the weight.
    """

    weight: PackedWeight | PreparedWeight | Tensor
    bias: Tensor | None
    act_bits: int

    def prepared(self, backend: str) -> "Linear":
        """With the weight in the layout its twin likes, where int8 rows meet a packed weight."""
        if self.act_bits == 16 or isinstance(self.weight, (Tensor, PreparedWeight)):
            return self
        return replace(self, weight=prepare(self.weight, backend))

    def __call__(self, x: Activation, *, backend: str = "auto") -> Tensor:
        """fp32 [M, N] for x [M, K]."""
        return linear(x, self.weight, self.bias, backend=backend)


def load_weight(fmt: WeightFormat, names: Sequence[str], get: Get) -> PackedWeight | Tensor:
    """The weights of linears ``names``, stacked along N; float weights become fp32."""
    if fmt.bits == 16:
        parts = [get(f"{name}.weight").to(torch.float32) for name in names]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    kind = packed_type(fmt)
    parts_of = [field.name for field in fields(kind)]
    packed = [kind(**{part: get(f"{name}.{part}") for part in parts_of}) for name in names]
    return packed[0] if len(packed) == 1 else kind.stack(packed)  # type: ignore[arg-type]


def load_linear(
    fmt: WeightFormat,
    act_bits: int,
    names: Sequence[str],
    bias: bool,
    get: Get,
    backend: str = "oracle",
) -> Linear:
    """Linears ``names`` (which share their input) as one, stacked along N in that order.

    The weight is prepared for ``backend``: canonical for the oracle.
    """
    biases = [get(f"{name}.bias").to(torch.float32) for name in names] if bias else []
    weight, stacked = load_weight(fmt, names, get), torch.cat(biases) if biases else None
    return Linear(weight, stacked, act_bits).prepared(backend)
