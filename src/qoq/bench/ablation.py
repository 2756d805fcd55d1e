"""What the W4A8 linears gain: the same model with linears that dequantize and call torch.

For benches alone. Weights stay packed and every call turns them into bf16 again, as 4-bit methods
without integer kernels do (QServe section 3.2).
"""

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from qoq.formats.activation import QuantizedActivation
from qoq.formats.weights import ChannelWeight, GroupWeight, PackedWeight
from qoq.kernels.act_quant import Activation
from qoq.kernels.prepared import PreparedWeight
from qoq.models.decoder import Decoder, DecoderLayer
from qoq.models.layers import Linear

PART_ELEMENTS = 1 << 20  # dequantized at a time, so that what lies between stays in a cache


class DequantizedWeight(PreparedWeight):
    """A packed weight [N, K] that ``multiply`` turns into bf16 for each call."""

    backend: ClassVar[str] = "cpu"

    def __init__(self, weight: PackedWeight) -> None:
        (n, k), tensors = weight.shape, weight.tensors()
        rows = max(1, PART_ELEMENTS // k)
        self.shape, self.format = weight.shape, weight.format
        self._parts = [
            type(weight)(**{name: t[i : i + rows] for name, t in tensors.items()})
            for i in range(0, n, rows)
        ]

    def multiply(self, x: Activation, bias: Tensor | None) -> Tensor:
        """fp32 [M, N] from x [M, K], rounded to bf16, and the weight's integers in bf16 (exact).

        Scales come after the product, on [M, N], as in our own kernels.
        """
        rows = x.dequantize() if isinstance(x, QuantizedActivation) else x
        row_sum = rows.sum(dim=1, keepdim=True)
        narrow = rows.to(torch.bfloat16)
        out = torch.cat([_part(narrow, row_sum, part) for part in self._parts], dim=1)
        return out if bias is None else out.add_(bias)


def _part(rows: Tensor, row_sum: Tensor, weight: PackedWeight) -> Tensor:
    product = (rows @ weight.int8().to(torch.bfloat16).T).to(torch.float32)
    if isinstance(weight, ChannelWeight):
        return product.mul_(weight.scale).add_(weight.offset * row_sum)
    return product.mul_(weight.channel_scale if isinstance(weight, GroupWeight) else weight.scale)


def dequantize_linears(decoder: Decoder) -> Decoder:
    """The decoder with every linear, lm_head too, replaced; activations enter them as floats.

    Its weights must be canonical (made for backend ``oracle``).
    """

    def swap(linear: Linear) -> Linear:
        weight = linear.weight
        if isinstance(weight, Tensor):
            return linear
        if isinstance(weight, PreparedWeight):
            raise ValueError("weights laid out for a backend cannot be dequantized")
        return Linear(DequantizedWeight(weight), linear.bias, 16)

    def layer(old: DecoderLayer) -> DecoderLayer:
        return replace(
            old,
            qkv=swap(old.qkv),
            o=swap(old.o),
            gate_up=swap(old.gate_up),
            down=swap(old.down),
        )

    return replace(
        decoder, layers=[layer(old) for old in decoder.layers], lm_head=swap(decoder.lm_head)
    )
