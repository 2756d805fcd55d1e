"""What the tensors of a packed checkpoint may be called, hold and look like.

Everything here follows from the scheme alone; that a model's tensors are all there is
``PackedCheckpoint.verify``'s part.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields

import torch
from torch import Tensor

from qoq.checkpoint.shard import TensorEntry
from qoq.errors import CheckpointTensorError, CheckpointValueError
from qoq.formats.packing import unpack_nibbles
from qoq.formats.progressive import INT8_MAX, INT8_MIN, MAX_GROUP_SCALE
from qoq.formats.scheme import QuantScheme, WeightFormat
from qoq.formats.weights import packed_type

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_CHUNK = 1 << 22  # elements looked at together
_PARTS: dict[str, torch.dtype] = {
    "channel_scale": torch.float32,
    "scale": torch.float32,
    "offset": torch.float32,
    "group_scale": torch.uint8,
    "group_offset": torch.int8,
}
_OTHERS: dict[str, tuple[torch.dtype, ...]] = {
    "weight": FLOATS,
    "bias": (torch.float32,),
    "k_center": (torch.float32,),
}

Entries = Mapping[str, TensorEntry]


def weight_format(scheme: QuantScheme, linear: str) -> WeightFormat:
    """How the linear of that name is stored in ``scheme``."""
    return scheme.lm_head if linear == "lm_head" else scheme.weight


def check_structure(scheme: QuantScheme, entries: Entries) -> None:
    """Check names, dtypes and the shapes within each packed linear.

    Raises CheckpointTensorError.
    """
    known: set[str] = set()
    for linear in _packed_linears(entries):
        known |= _check_linear(weight_format(scheme, linear), linear, entries)
    for name, entry in entries.items():
        if name in known:
            continue
        allowed = _OTHERS.get(name.rpartition(".")[2])
        if allowed is None:
            raise CheckpointTensorError(f"Tensor {name} is unexpected in a {scheme} checkpoint.")
        if entry.dtype not in allowed:
            raise CheckpointTensorError(
                f"Tensor {name} has dtype {entry.dtype}; it must be {_either(allowed)}."
            )


def _packed_linears(names: Iterable[str]) -> list[str]:
    return sorted(name.removesuffix(".codes") for name in names if name.endswith(".codes"))


def _check_linear(fmt: WeightFormat, linear: str, entries: Entries) -> set[str]:
    """Check the tensors that store one linear and return their names."""
    if fmt.bits == 16:
        raise CheckpointTensorError(f"{linear} is packed, but the scheme keeps it in 16 bits.")
    names = {field.name: f"{linear}.{field.name}" for field in fields(packed_type(fmt))}
    for name in names.values():
        if name not in entries:
            raise CheckpointTensorError(f"Tensor {name} is missing beside {linear}.codes.")
    shape = entries[names["codes"]].shape
    if len(shape) != 2:
        raise CheckpointTensorError(
            f"Tensor {linear}.codes has shape {list(shape)}; it must be a matrix."
        )
    out, width = shape
    inp = width * 2 if fmt.bits == 4 else width
    if fmt.group_size and inp % fmt.group_size:
        raise CheckpointTensorError(
            f"{linear} has {inp} input channels, no multiple of its groups of {fmt.group_size}."
        )
    code_dtype = torch.uint8 if fmt.bits == 4 else torch.int8
    for part, name in names.items():
        dtype = _PARTS.get(part, code_dtype)
        want: tuple[int, ...] = (out,)
        if part == "codes":
            want = (out, width)
        elif fmt.group_size and part.startswith("group_"):
            want = (out, inp // fmt.group_size)
        if entries[name].dtype != dtype:
            raise CheckpointTensorError(
                f"Tensor {name} has dtype {entries[name].dtype}; it must be {dtype}."
            )
        if entries[name].shape != want:
            raise CheckpointTensorError(
                f"Tensor {name} has shape {list(entries[name].shape)}; beside {linear}.codes "
                f"{list(shape)} it must be {list(want)}."
            )
    return set(names.values())


def check_values(scheme: QuantScheme, names: Sequence[str], get: Callable[[str], Tensor]) -> None:
    """Check what the named tensors hold, one linear or tensor at a time.

    Raises CheckpointValueError.
    """
    for linear in _packed_linears(names):
        fmt = weight_format(scheme, linear)
        if fmt.bits == 8:
            _check_codes(f"{linear}.codes", get(f"{linear}.codes"))
        if fmt.group_size:
            _check_positive(f"{linear}.channel_scale", get(f"{linear}.channel_scale"))
            _check_groups(linear, get)
            continue
        _check_positive(f"{linear}.scale", get(f"{linear}.scale"))
        if fmt.bits == 4:
            _check_finite(f"{linear}.offset", get(f"{linear}.offset"))
    for name in names:
        if name.rpartition(".")[2] in _OTHERS:
            _check_finite(name, get(name))


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor is free of NaN and infinity, found without a copy of its size."""
    return all(bool(torch.isfinite(p).all()) for p in tensor.reshape(-1).split(_CHUNK))


def _check_finite(name: str, tensor: Tensor) -> None:
    if not all_finite(tensor):
        raise CheckpointValueError(f"Tensor {name} holds NaN or infinity. Copy it again.")


def _check_positive(name: str, scale: Tensor) -> None:
    _check_finite(name, scale)
    if not (scale > 0).all():
        raise CheckpointValueError(f"Tensor {name} holds scales that are not positive.")


def _check_codes(name: str, codes: Tensor) -> None:
    for part in codes.reshape(-1).split(_CHUNK):
        if (part == INT8_MIN).any():
            raise CheckpointValueError(f"Tensor {name} holds the code -128; codes end at -127.")


def _check_groups(linear: str, get: Callable[[str], Tensor]) -> None:
    """Group scales in 1..16, and no code in use whose value exceeds int8 (it would wrap)."""
    scale, offset = get(f"{linear}.group_scale"), get(f"{linear}.group_offset")
    if ((scale < 1) | (scale > MAX_GROUP_SCALE)).any():
        raise CheckpointValueError(
            f"Tensor {linear}.group_scale holds a scale outside 1..{MAX_GROUP_SCALE}."
        )
    # Values cannot fall below the offset, so only groups whose code 15 would exceed 127 matter.
    suspects = (scale.to(torch.int32) * 15 + offset > INT8_MAX).nonzero()
    if not len(suspects):
        return
    codes = get(f"{linear}.codes").unflatten(1, (scale.shape[1], -1))
    for rows, groups in (part.unbind(1) for part in suspects.split(1 << 14)):
        top = unpack_nibbles(codes[rows, groups]).amax(-1).to(torch.int32)
        value = top * scale[rows, groups] + offset[rows, groups]
        if (value > INT8_MAX).any():
            worst = int(value.argmax())
            raise CheckpointValueError(
                f"{linear}: row {int(rows[worst])}, group {int(groups[worst])} holds a code whose "
                f"value {int(value[worst])} exceeds int8. Quantize the model again."
            )


def _either(dtypes: Iterable[torch.dtype]) -> str:
    return " or ".join(str(dtype) for dtype in dtypes)
