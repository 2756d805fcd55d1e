"""One safetensors file: a strict header reader and a streaming writer with canonical bytes.

The library reads the tensors. We write the file ourselves so that equal tensors give equal bytes
whatever the library's version, and so that no second copy of a shard is made in memory.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qoq.checkpoint.files import atomic_file, parse_json
from qoq.errors import CheckpointError, CheckpointIncompleteError, CheckpointTensorError

HEADER_LIMIT = 64 << 20  # bytes
DTYPES = {  # in the order in which their data lies in a file: widest first, so all is aligned
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = "__metadata__"


@dataclass(frozen=True)
class TensorEntry:
    """What a header says of a tensor. ``nbytes`` is its size in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """name -> entry, proven to describe the file's bytes without a gap, overlap or rest.

    Raises CheckpointIncompleteError for a truncated file, CheckpointTensorError for a dtype that
    does not exist here, CheckpointError for any other damage.
    """
    try:
        data, room = _read_raw_header(path)
    except OSError as error:
        raise CheckpointIncompleteError(f"{path} cannot be read ({error}).") from None
    try:
        raw = parse_json(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: its header is no JSON ({error}).") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} is damaged: its header is no JSON object.")
    raw.pop(_METADATA, None)
    spans = {name: _entry(path, name, value) for name, value in raw.items()}
    position = 0
    for name, (_, begin, end) in sorted(spans.items(), key=lambda item: item[1][1:]):
        if begin != position:
            raise CheckpointError(f"{path} is damaged: a gap or overlap before tensor {name}.")
        position = end
    if position > room:
        raise CheckpointIncompleteError(
            f"{path} is truncated: its tensors need {position:,} bytes, {room:,} are there."
        )
    if position < room:
        raise CheckpointError(
            f"{path} is damaged: {room - position:,} bytes follow its last tensor."
        )
    return {name: entry for name, (entry, _, _) in spans.items()}


def _read_raw_header(path: Path) -> tuple[bytes, int]:
    """The header and the number of bytes that follow it."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or size == 8:
            raise CheckpointIncompleteError(f"{path} is truncated: it has only {size} bytes.")
        if length > HEADER_LIMIT:
            raise CheckpointError(
                f"{path} is damaged: it claims a header of {length:,} bytes, more than the limit "
                f"of {HEADER_LIMIT:,}."
            )
        if length > size - 8:
            raise CheckpointIncompleteError(
                f"{path} is truncated: its header alone needs {length + 8:,} bytes, "
                f"but it has {size:,}."
            )
        return file.read(length), size - 8 - length


def _entry(path: Path, name: str, value: Any) -> tuple[TensorEntry, int, int]:
    """A tensor's entry and its begin and end within the data."""
    if not name.isprintable():
        raise CheckpointError(f"{path} is damaged: a tensor is called {name!r}.")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{path} is damaged: tensor {name} needs dtype, shape, data_offsets.")
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise CheckpointTensorError(
            f"Tensor {name} in {path} has dtype {value['dtype']!r}; only {', '.join(DTYPES)} exist."
        )
    shape, offsets = value["shape"], value["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(
            type(n) is int and 0 <= n < 1 << 62 for n in numbers
        ):
            raise CheckpointError(f"{path} is damaged: tensor {name} has sizes {numbers!r}.")
    nbytes = prod(shape) * dtype.itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != nbytes:
        raise CheckpointTensorError(
            f"Tensor {name} in {path} has shape {shape} and dtype {value['dtype']}, {nbytes:,} "
            f"bytes, but data_offsets {offsets}."
        )
    return TensorEntry(dtype, tuple(shape), nbytes), offsets[0], offsets[1]


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file atomically; equal names and tensors give equal bytes.

    Data lies by dtype as in ``DTYPES``, then by name; the header is compact JSON in the same
    order, padded with spaces to a multiple of 8 bytes. Nothing but the tensors themselves is held
    in memory.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES or name == _METADATA:
            raise CheckpointTensorError(
                f"Tensor {name} with dtype {tensor.dtype} cannot be stored; "
                f"only {', '.join(DTYPES)} exist."
            )
    rank = {dtype: number for number, dtype in enumerate(DTYPES.values())}
    order = sorted(tensors, key=lambda name: (rank[tensors[name].dtype], name))
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    position = 0
    for name in order:
        tensor = tensors[name]
        end = position + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    data = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    data += b" " * (-len(data) % 8)
    with atomic_file(path) as file:
        file.write(len(data).to_bytes(8, "little"))
        file.write(data)
        for name in order:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            if flat.numel():
                file.write(flat.view(torch.uint8).numpy().data)
