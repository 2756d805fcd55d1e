"""The two shapes in which QServe weights are found, each turned into our packed weights exactly.

A converted checkpoint holds ``qweight`` and its scales in tile order. Before conversion there is
a pair of files: ``model.pt`` with the quantized weights written out in floats, and ``scale.pt``
with the scales and either ``.zero`` (in codes) or ``.scaled_zero`` (times the scale).
"""

from pathlib import Path

import torch
from torch import Tensor

from qoq.checkpoint.qserve_groups import OrderEvidence, order_evidence, to_group_weight
from qoq.checkpoint.qserve_layout import (
    ORDERS,
    ScaleOrder,
    check_tiles,
    unpack_group_params,
    unpack_tiles,
)
from qoq.checkpoint.tensor_files import TensorFiles
from qoq.errors import CheckpointTensorError, CheckpointValueError
from qoq.formats.packing import pack_nibbles
from qoq.formats.scheme import GROUP_SIZES
from qoq.formats.weights import ChannelWeight, Int8Weight, PackedWeight

_TOLERANCE = 0.3  # of a step: what 16-bit floats may have moved a value; half a step is ambiguous


class ConvertedSource:
    """A checkpoint as QServe serves it."""

    def __init__(self, tensors: TensorFiles, order: ScaleOrder = "kernel") -> None:
        self.tensors = tensors
        self.order = order
        names = tensors.names()
        self.linears = [n.removesuffix(".qweight") for n in names if n.endswith(".qweight")]
        int8 = [n.removesuffix(".dequant_scale") for n in names if n.endswith(".dequant_scale")]
        self.linears = sorted(self.linears + int8)
        parts = ("qweight", "s1_scales", "s1_szeros", "s2_scales", "s2_zeros", "dequant_scale")
        used = {f"{linear}.{part}" for linear in self.linears for part in parts}
        used |= {f"{linear}.weight" for linear in int8}
        self.others = [name for name in names if name not in used]

    def linear(self, name: str) -> PackedWeight:
        """One linear. Raises CheckpointTensorError, CheckpointValueError."""
        if f"{name}.qweight" not in self.tensors:
            codes = _typed(self.tensors, f"{name}.weight", torch.int8)
            scale = self._scale(f"{name}.dequant_scale", codes.shape[0])
            return _int8_weight(name, codes, scale)
        codes = self._codes(name)
        scale = self._scale(f"{name}.s1_scales", codes.shape[0])
        if f"{name}.s1_szeros" not in self.tensors:
            return to_group_weight(name, codes, scale, *self._group_params(name, codes, self.order))
        zeros = _floats(f"{name}.s1_szeros", self.tensors.get(f"{name}.s1_szeros", 1))
        return _channel_weight(name, codes, scale, -zeros)

    def evidence(self, name: str) -> OrderEvidence:
        """What one linear tells about the scale order; nothing unless it has groups."""
        if f"{name}.s2_scales" not in self.tensors:
            return OrderEvidence()
        codes = self._codes(name)
        return order_evidence(codes, {o: self._group_params(name, codes, o) for o in ORDERS})

    def _codes(self, name: str) -> Tensor:
        qweight = _typed(self.tensors, f"{name}.qweight", torch.int8)
        check_tiles(name, qweight.shape[0], qweight.shape[1] * 2)
        return unpack_tiles(qweight)

    def _scale(self, name: str, rows: int) -> Tensor:
        scale = _floats(name, self.tensors.get(name, 1))
        if scale.shape != (rows,):
            raise CheckpointTensorError(
                f"Tensor {name} has shape {list(scale.shape)}; it must be [{rows}]."
            )
        return scale

    def _group_params(self, name: str, codes: Tensor, order: ScaleOrder) -> tuple[Tensor, Tensor]:
        scale = _typed(self.tensors, f"{name}.s2_scales", torch.int8)
        zeros = _typed(self.tensors, f"{name}.s2_zeros", torch.int8)
        if scale.shape != zeros.shape or scale.shape[1] != codes.shape[0]:
            raise CheckpointTensorError(
                f"{name}.s2_scales and .s2_zeros have shapes {list(scale.shape)} and "
                f"{list(zeros.shape)}; both must be [groups, {codes.shape[0]}]."
            )
        _check_groups(name, codes.shape[1], scale.shape[0])
        return unpack_group_params(scale, order), unpack_group_params(zeros, order)


class FakeQuantSource:
    """The quantizer's own output: ``model.pt`` and ``scale.pt``."""

    def __init__(self, folder: Path) -> None:
        self.tensors = TensorFiles([folder / "model.pt"])
        self._scales = TensorFiles([folder / "scale.pt"])
        end = ".weight.scale.0"
        self.linears = [n.removesuffix(end) for n in self._scales.names() if n.endswith(end)]
        used = {f"{linear}.weight" for linear in self.linears}
        self.others = [name for name in self.tensors.names() if name not in used]

    def linear(self, name: str) -> PackedWeight:
        """One linear. Raises CheckpointTensorError, CheckpointValueError."""
        weight = _floats(f"{name}.weight", self.tensors.get(f"{name}.weight", 2))
        rows, columns = weight.shape
        if not rows or not columns or columns % 2:
            raise CheckpointTensorError(
                f"{name}.weight cannot be packed: it is {rows} x {columns}."
            )
        scale = _positive(f"{name}.weight.scale.0", self._param(name, "scale.0", rows, 1))
        pre = self._zero(name, "zero")
        post = self._zero(name, "scaled_zero")
        if f"{name}.weight.scale.1" in self._scales:
            return self._groups(name, weight, scale, pre, post)
        if pre is None and post is None:
            codes = _whole(name, weight / scale)
            if codes.abs().max() > 127:
                raise CheckpointValueError(f"{name}.weight has codes beyond +-127.")
            return _int8_weight(name, codes.to(torch.int8), scale.flatten())
        if pre is not None:
            zero = _whole(name, _expand(name, pre, rows, 1))
            zero += 8 * (zero.min() < 0)  # signed 4-bit zeros, and codes
            offset = -zero * scale
        else:
            assert post is not None
            offset = -_floats(name, _expand(name, post, rows, 1))
        codes = _whole(name, (weight - offset) / scale)
        if codes.min() < 0:  # signed codes
            codes, offset = codes + 8, offset - 8 * scale
        return _channel_weight(name, _uint4(name, codes), scale.flatten(), offset.flatten())

    def _groups(
        self, name: str, weight: Tensor, scale: Tensor, pre: Tensor | None, post: Tensor | None
    ) -> PackedWeight:
        rows, columns = weight.shape
        count = self._scales.get(f"{name}.weight.scale.1").numel() // rows
        _check_groups(name, columns, count)
        group_scale = _whole(name, self._param(name, "scale.1", rows, count))
        group_scale = _positive(f"{name}.weight.scale.1", group_scale)
        if pre is not None:
            zero = _whole(name, _expand(name, pre, rows, count))
            zero += 8 * (zero.min() < 0)
            offset = -zero * group_scale
        elif post is not None:
            offset = -_whole(name, _expand(name, post, rows, count))
        else:
            raise CheckpointTensorError(f"scale.pt has no {name}.weight.zero or .scaled_zero.")
        w8 = _whole(name, weight / scale).unflatten(1, (count, -1))
        codes = (w8 - offset.unsqueeze(-1)) / group_scale.unsqueeze(-1)
        if not torch.equal(codes, codes.round()):
            raise CheckpointValueError(
                f"{name}.weight in model.pt is not made of the steps that scale.pt gives; the "
                "files don't belong together."
            )
        if codes.min() < 0:
            codes, offset = codes + 8, offset - 8 * group_scale
        codes = _uint4(name, codes.flatten(1))
        return to_group_weight(name, codes, scale.flatten(), group_scale, offset)

    def _param(self, name: str, part: str, rows: int, count: int) -> Tensor:
        full = f"{name}.weight.{part}"
        return _floats(full, _expand(full, self._scales.get(full), rows, count))

    def _zero(self, name: str, part: str) -> Tensor | None:
        """A zero-point tensor; a single 0 is how "none" may be spelt."""
        full = f"{name}.weight.{part}"
        if full not in self._scales:
            return None
        zero = self._scales.get(full)
        return None if zero.numel() == 1 and not zero.any() else zero


def _typed(tensors: TensorFiles, name: str, dtype: torch.dtype) -> Tensor:
    tensor = tensors.get(name, 2)
    if tensor.dtype != dtype:
        raise CheckpointTensorError(
            f"Tensor {name} has dtype {tensor.dtype}; QServe's has {dtype}."
        )
    return tensor


def _floats(name: str, tensor: Tensor) -> Tensor:
    """fp32; finite or refused."""
    tensor = tensor.to(torch.float32)
    if not torch.isfinite(tensor).all():
        raise CheckpointValueError(f"Tensor {name} holds NaN or infinity.")
    return tensor


def _positive(name: str, scale: Tensor) -> Tensor:
    if not (scale > 0).all():
        raise CheckpointValueError(f"Tensor {name} holds scales that are not positive.")
    return scale


def _expand(name: str, tensor: Tensor, rows: int, count: int) -> Tensor:
    """Any shape of rows * count elements, or of one for all -> fp32 [rows, count]."""
    if tensor.numel() not in (1, rows * count):
        raise CheckpointTensorError(
            f"Tensor {name} has shape {list(tensor.shape)}; it must hold {rows} x {count} numbers."
        )
    return tensor.to(torch.float32).reshape(-1).expand(rows * count).reshape(rows, count).clone()


def _whole(name: str, values: Tensor) -> Tensor:
    """The integers that floats stand for; refused if they are not near any."""
    whole = values.round()
    if not ((values - whole).abs() <= _TOLERANCE).all():
        raise CheckpointValueError(
            f"{name}: model.pt and scale.pt don't belong together; the weights are no multiples "
            "of the scales."
        )
    return whole


def _uint4(name: str, codes: Tensor) -> Tensor:
    if not ((codes >= 0) & (codes <= 15)).all():
        raise CheckpointValueError(
            f"{name} has codes outside 0..15; only 4-bit weights can be read."
        )
    return codes.to(torch.uint8)


def _check_groups(name: str, columns: int, count: int) -> None:
    if not count or columns % count or columns // count not in GROUP_SIZES:
        raise CheckpointTensorError(
            f"{name} has {columns} input channels in {count} groups; groups must be of "
            f"{GROUP_SIZES} channels."
        )


def _channel_weight(name: str, codes: Tensor, scale: Tensor, offset: Tensor) -> ChannelWeight:
    """codes uint8 [N, K], scale and offset fp32 [N]; a row of scale 0 holds its offset alone."""
    if offset.shape != scale.shape or (scale < 0).any():
        raise CheckpointValueError(f"{name} needs one zero per channel and no negative scale.")
    codes = torch.where((scale == 0)[:, None], torch.zeros_like(codes), codes)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return ChannelWeight(pack_nibbles(codes), scale, offset)


def _int8_weight(name: str, codes: Tensor, scale: Tensor) -> Int8Weight:
    """codes int8 [N, K], scale fp32 [N]; a row of scale 0 becomes zeros."""
    if (codes == -128).any() or (scale < 0).any():
        raise CheckpointValueError(f"{name} holds the code -128 or a negative scale.")
    codes = torch.where((scale == 0)[:, None], torch.zeros_like(codes), codes)
    return Int8Weight(codes, torch.where(scale == 0, torch.ones_like(scale), scale))
