"""Packed weights [N, K]: what a linear multiplies by. Canonical (row-major, device-neutral) layout.

Three types, one per row of the design's format table. Each knows its tensors by the names they
have in a checkpoint, how to dequantize, and how to stack along N (fused qkv and gate/up).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Self

import torch
from torch import Tensor

from qoq.formats.packing import unpack_nibbles
from qoq.formats.scheme import WeightFormat


class _Packed:
    """What the three formats share: tensors by name, and stacking along N."""

    def tensors(self) -> dict[str, Tensor]:
        """name -> tensor, the suffixes under which a checkpoint stores them."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    @classmethod
    def stack(cls, parts: Sequence[Self]) -> Self:
        """Concatenate along output channels (all tensors have N first)."""
        names = parts[0].tensors()
        return cls(**{n: torch.cat([p.tensors()[n] for p in parts]) for n in names})

    def to(self, device: torch.device | str) -> Self:
        return type(self)(**{n: t.to(device) for n, t in self.tensors().items()})


@dataclass(frozen=True)
class GroupWeight(_Packed):
    """4-bit progressive groups: ``w = (code*group_scale + group_offset) * channel_scale``.

    codes uint8 [N, K/2] (nibbles), channel_scale fp32 [N], group_scale uint8 [N, K/G] in 1..16,
    group_offset int8 [N, K/G]. Example: N=384, K=1024, G=128 -> [384, 512], [384], [384, 8] x 2.
    """

    codes: Tensor
    channel_scale: Tensor
    group_scale: Tensor
    group_offset: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1] * 2

    @property
    def format(self) -> WeightFormat:
        return WeightFormat(4, self.shape[1] // self.group_scale.shape[1])

    def int8(self) -> Tensor:
        """Level-1 integers int8 [N, K]: what meets the int8 activations in the main loop."""
        codes: Tensor = unpack_nibbles(self.codes).unflatten(1, (self.group_scale.shape[1], -1))
        # In bytes, as a kernel does it: 15 * 16 never carries, and adding the offset's byte wraps
        # to the int8 that int32 arithmetic (``group_values``) gives.
        codes.mul_(self.group_scale[..., None])
        codes.add_(self.group_offset.view(torch.uint8)[..., None])
        return codes.view(torch.int8).flatten(1)

    def dequantize(self) -> Tensor:
        """fp32 [N, K]."""
        return self.int8().to(torch.float32) * self.channel_scale[:, None]


@dataclass(frozen=True)
class ChannelWeight(_Packed):
    """4-bit per channel: ``w = code*scale + offset``; codes uint8 [N, K/2], others fp32 [N]."""

    codes: Tensor
    scale: Tensor
    offset: Tensor

    format: ClassVar[WeightFormat] = WeightFormat(4)

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1] * 2

    def int8(self) -> Tensor:
        """The codes 0..15 as int8 [N, K]: the offset leaves the main loop (QServe 5.2.2)."""
        return unpack_nibbles(self.codes).to(torch.int8)

    def dequantize(self) -> Tensor:
        """fp32 [N, K]."""
        return self.int8().to(torch.float32) * self.scale[:, None] + self.offset[:, None]


@dataclass(frozen=True)
class Int8Weight(_Packed):
    """8-bit symmetric per channel: ``w = code*scale``; codes int8 [N, K], scale fp32 [N]."""

    codes: Tensor
    scale: Tensor

    format: ClassVar[WeightFormat] = WeightFormat(8)

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def int8(self) -> Tensor:
        return self.codes

    def dequantize(self) -> Tensor:
        """fp32 [N, K]."""
        return self.codes.to(torch.float32) * self.scale[:, None]


PackedWeight = GroupWeight | ChannelWeight | Int8Weight


def packed_type(fmt: WeightFormat) -> type[GroupWeight] | type[ChannelWeight] | type[Int8Weight]:
    """The class that stores ``fmt``; 16-bit weights are plain tensors and have none."""
    if fmt.bits == 8:
        return Int8Weight
    if fmt.bits == 4:
        return GroupWeight if fmt.group_size else ChannelWeight
    raise ValueError("16-bit weights are not packed")
