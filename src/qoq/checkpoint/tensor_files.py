"""TensorFiles: the named tensors of safetensors and pickle files, mapped rather than read.

Pickles are opened by ``torch.load(weights_only=True)`` alone, which runs nothing from the file.
"""

import pickle
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qoq.checkpoint.shard import read_header
from qoq.errors import CheckpointTensorError, SourceError

_PICKLES = (".bin", ".pt", ".pth")
# Pickles that trainers leave beside a model.
_NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")


class TensorFiles:
    """Tensors by name over several files; ``get`` copies one into memory."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Raises SourceError for a file that cannot be read or a name that comes twice."""
        self._tensors: dict[str, Tensor] = {}
        self._file_of: dict[str, Path] = {}
        self._open: tuple[Path, Any] | None = None
        for file in files:
            tensors = _load_pickle(file) if file.suffix in _PICKLES else None
            if tensors is not None:
                self._tensors |= tensors
            for name in read_header(file) if tensors is None else tensors:
                if name in self._file_of:
                    raise SourceError(
                        f"Tensor {name} is in both {self._file_of[name].name} and {file.name}; "
                        "keep one of the files."
                    )
                self._file_of[name] = file

    @classmethod
    def in_folder(cls, folder: Path) -> Self:
        """All weights of a folder: its safetensors, or else its pickles."""
        files = sorted(p for p in folder.iterdir() if p.is_file() and p.name not in _NOT_WEIGHTS)
        chosen = [p for p in files if p.suffix == ".safetensors"]
        chosen = chosen or [p for p in files if p.suffix in _PICKLES]
        if not chosen:
            raise SourceError(f"{folder} holds no *.safetensors, *.bin or *.pt file.")
        return cls(chosen)

    def names(self) -> list[str]:
        """Every tensor's name, sorted."""
        return sorted(self._file_of)

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def get(self, name: str, ndim: int | None = None) -> Tensor:
        """The tensor. Raises CheckpointTensorError if missing or not of ``ndim`` dimensions."""
        if name not in self._file_of:
            raise CheckpointTensorError(f"Tensor {name} is missing.")
        tensor = self._tensors.get(name)
        if tensor is None:
            tensor = self._from_safetensors(self._file_of[name], name)
        if ndim is not None and tensor.ndim != ndim:
            raise CheckpointTensorError(
                f"Tensor {name} has shape {list(tensor.shape)}; it must have {ndim} dimensions."
            )
        return tensor.detach().clone(memory_format=torch.contiguous_format)

    def _from_safetensors(self, file: Path, name: str) -> Tensor:
        try:
            if self._open is None or self._open[0] != file:
                self._open = None
                # Typed Any: safetensors' handle has no usable type here.
                handle: Any = safe_open(str(file), framework="pt", device="cpu")
                self._open = (file, handle)
            tensor: Tensor = self._open[1].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise SourceError(f"{file} cannot be read ({error}). Copy it again.") from None
        return tensor


def _load_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled state dict, mapped where its format allows."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; the outcome is what counts
            try:
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except (RuntimeError, ValueError):  # files of torch < 1.6 cannot be mapped
                state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own text recommends weights_only=False; name the offender instead.
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise SourceError(
            f"{path} is refused: it asks for {found[1] if found else 'more than tensors'}, and "
            "nothing but plain tensors is ever loaded from a pickle (or it is damaged)."
        ) from None
    except Exception as error:  # a damaged pickle can make the loader raise anything
        raise SourceError(
            f"{path} cannot be read ({type(error).__name__}: {error}). Copy it again."
        ) from None
    if not isinstance(state, dict):
        raise SourceError(f"{path} holds a {type(state).__name__}, not tensors by name.")
    tensors = {str(k): v for k, v in state.items() if isinstance(v, Tensor)}
    for name, tensor in tensors.items():
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.is_quantized:
            raise SourceError(f"Tensor {name} in {path} is no plain dense tensor.")
        # Strides of 0 could claim any size over a few stored bytes.
        if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise SourceError(f"Tensor {name} in {path} claims more elements than it stores.")
    return tensors
