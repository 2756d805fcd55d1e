"""PackedCheckpoint: our format read back, once it is proven sound (docs/checkpoint-format.md)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qoq.checkpoint.files import member, read_object
from qoq.checkpoint.manifest import parse_manifest
from qoq.checkpoint.partial import SUFFIX
from qoq.checkpoint.shard import TensorEntry, read_header
from qoq.checkpoint.values import FLOATS, check_structure, check_values
from qoq.checkpoint.writer import CONFIG_NAME, INDEX_NAME, SHARD_SUFFIX, CheckpointWriter
from qoq.errors import (
    CheckpointError,
    CheckpointIncompleteError,
    CheckpointPathError,
    CheckpointTensorError,
)
from qoq.formats.scheme import QuantScheme

__all__ = ["CheckpointWriter", "Expected", "PackedCheckpoint"]

# Name -> (shape, dtype); None stands for any of fp32, fp16 and bf16.
Expected = Mapping[str, tuple[tuple[int, ...], torch.dtype | None]]


class PackedCheckpoint:
    """A packed checkpoint whose files, headers and values have been checked.

    raw_config: config.json without its quantization_config, which is ``manifest``.
    """

    def __init__(
        self,
        path: Path,
        raw_config: dict[str, Any],
        manifest: dict[str, Any],
        scheme: QuantScheme,
        shard_of: dict[str, Path],
        entries: dict[str, TensorEntry],
    ) -> None:
        self.path = path
        self.raw_config = raw_config
        self.manifest = manifest
        self.scheme = scheme
        self._shard_of = shard_of
        self._entries = entries
        self._open: tuple[Path, Any] | None = None

    @classmethod
    def open(cls, path: str | Path, *, values: bool = True) -> Self:
        """Open a folder. Tensors are mapped one shard at a time, never all in memory.

        ``values=False`` leaves out the check of what the tensors hold (one pass over scales and
        float tensors), for looking at sizes only. Raises the subclass of CheckpointError that
        names the cause.
        """
        folder = Path(path)
        raw_config, manifest = _read_config(folder)
        try:
            scheme = parse_manifest(manifest)
        except CheckpointError as error:
            raise type(error)(f"{folder}: {error}") from None
        shard_of = _read_index(folder)
        entries = _read_shards(folder, shard_of)
        check_structure(scheme, entries)
        checkpoint = cls(folder, raw_config, manifest, scheme, shard_of, entries)
        if values:
            check_values(scheme, checkpoint.names(), checkpoint._map)
            checkpoint.close()
        return checkpoint

    def names(self) -> list[str]:
        """Every tensor's name, sorted."""
        return sorted(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from its header."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype, from its header."""
        return self._entry(name).dtype

    def nbytes(self, name: str) -> int:
        """A tensor's bytes on disk."""
        return self._entry(name).nbytes

    def get(self, name: str) -> Tensor:
        """The tensor, as a copy that keeps no file mapped."""
        return self._map(name).clone()

    def close(self) -> None:
        """Unmap the shard in use; ``get`` maps it again when asked."""
        self._open = None

    def verify(self, expected: Expected) -> None:
        """Prove that the checkpoint holds exactly these tensors in these shapes and dtypes.

        Raises CheckpointTensorError.
        """
        missing = sorted(set(expected) - set(self._entries))
        if missing:
            raise CheckpointTensorError(
                f"{self.path} lacks {len(missing)} of {len(expected)} tensors ({missing[0]}, ...)."
            )
        extra = sorted(set(self._entries) - set(expected))
        if extra:
            raise CheckpointTensorError(
                f"{self.path} holds {len(extra)} tensors its config.json does not imply "
                f"({extra[0]}, ...)."
            )
        for name, (shape, dtype) in expected.items():
            entry = self._entries[name]
            if entry.shape != tuple(shape):
                raise CheckpointTensorError(
                    f"Tensor {name} has shape {list(entry.shape)}, "
                    f"but config.json implies {list(shape)}."
                )
            if entry.dtype != dtype and not (dtype is None and entry.dtype in FLOATS):
                raise CheckpointTensorError(
                    f"Tensor {name} has dtype {entry.dtype}; it must be {dtype or 'a float'}."
                )

    def _entry(self, name: str) -> TensorEntry:
        if name not in self._entries:
            raise CheckpointTensorError(f"{self.path} holds no tensor {name}.")
        return self._entries[name]

    def _map(self, name: str) -> Tensor:
        """The tensor within its mapped file."""
        self._entry(name)
        shard = self._shard_of[name]
        try:
            if self._open is None or self._open[0] != shard:
                self._open = None  # unmap the previous shard before the next one is mapped
                # Typed Any: safetensors' handle has no usable type here.
                handle: Any = safe_open(str(shard), framework="pt", device="cpu")
                self._open = (shard, handle)
            tensor: Tensor = self._open[1].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointIncompleteError(f"{shard} cannot be read ({error}).") from None
        return tensor


def _read_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json, split into the model's part and ours."""
    if not folder.is_dir():
        raise CheckpointIncompleteError(f"There is no checkpoint folder {folder}.")
    if not (folder / CONFIG_NAME).exists():
        unfinished = folder.name.endswith(SUFFIX) or (folder / INDEX_NAME).exists()
        raise CheckpointIncompleteError(
            f"{folder} has no {CONFIG_NAME}"
            + ("; it was never finished. Run the quantization again." if unfinished else ".")
        )
    raw = read_object(member(folder, CONFIG_NAME, "the format"))
    manifest = raw.pop("quantization_config", None)
    if not isinstance(manifest, dict):
        raise CheckpointError(
            f"{folder / CONFIG_NAME} has no quantization_config: this is no packed checkpoint."
        )
    return raw, manifest


def _read_index(folder: Path) -> dict[str, Path]:
    """Tensor name -> shard, every shard proven to lie in the folder."""
    index = read_object(member(folder, INDEX_NAME, "the format"))
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX_NAME} has no weight_map. Copy it again.")
    paths: dict[Any, Path] = {}
    for file in weight_map.values():
        if not isinstance(file, str) or file not in paths:
            paths[str(file)] = member(folder, file, INDEX_NAME)
            if not str(file).endswith(SHARD_SUFFIX):
                raise CheckpointPathError(f"{INDEX_NAME} names {file!r}, no safetensors file.")
    return {name: paths[file] for name, file in weight_map.items()}


def _read_shards(folder: Path, shard_of: dict[str, Path]) -> dict[str, TensorEntry]:
    """Every header, agreeing with the index about which tensor is where."""
    entries: dict[str, TensorEntry] = {}
    found_in: dict[str, Path] = {}
    for shard in sorted(set(shard_of.values())):
        for name, entry in read_header(shard).items():
            if name in found_in:
                raise CheckpointTensorError(
                    f"Tensor {name} is in both {found_in[name].name} and {shard.name}."
                )
            if name not in shard_of:
                raise CheckpointTensorError(
                    f"{shard} holds tensor {name}, which {INDEX_NAME} does not list."
                )
            entries[name], found_in[name] = entry, shard
    for name, shard in shard_of.items():
        if found_in.get(name) != shard:
            where = f"; it is in {found_in[name].name}" if name in found_in else ""
            raise CheckpointTensorError(
                f"{folder / INDEX_NAME} says tensor {name} is in {shard.name}, but it is "
                f"not{where}."
            )
    return entries
