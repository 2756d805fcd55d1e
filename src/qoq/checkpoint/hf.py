"""HFSource: a full-precision Hugging Face folder as named tensors, one mapped shard at a time.

Only safetensors are read. Everything that can be wrong about the folder as a whole is found when
it is opened, before any work starts.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qoq.errors import SourceError

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# What a hub download fetches: configs, tokenizers and safetensors; never pickles or code.
HUB_PATTERNS = ("*.json", "*.safetensors", "tokenizer.model", "*.tiktoken", "merges.txt", "*.jinja")
_SAMPLES, _SAMPLE_BYTES = 64, 4096  # of a shard, for its fingerprint
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class HFSource:
    """A folder with ``config.json`` and safetensors weights.

    Opening reads every shard's header (names, shapes, dtypes, lengths) and no weights.
    Raises SourceError for whatever makes the folder unreadable.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise SourceError(f"There is no model folder {self.path}.")
        self.config: dict[str, Any] = read_json_object(self.path / CONFIG_NAME)
        self._shard_of: dict[str, Path] = {}
        self._shape_of: dict[str, tuple[int, ...]] = {}
        shards, index = self._shards()
        for shard in shards:
            self._read_header(shard)
        for name, shard in index.items():
            found = self._shard_of.get(name)
            if found != shard:
                where = f"; it is in {found.name}" if found else ""
                raise SourceError(
                    f"{INDEX_NAME} says tensor {name} is in {shard.name}, but it is not{where}. "
                    "Download the model again."
                )

    def names(self) -> list[str]:
        """Every tensor's name, sorted."""
        return sorted(self._shard_of)

    def __contains__(self, name: object) -> bool:
        return name in self._shard_of

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        self._require(name)
        return self._shape_of[name]

    def get(self, name: str) -> Tensor:
        """The tensor itself, in its stored float dtype: a copy that keeps no file mapped."""
        # Mapping a shard costs a fraction of a millisecond; keeping it mapped would leave every
        # page ever touched in this process's resident memory.
        with _open_shard(self._require(name)) as handle:
            tensor: Tensor = handle.get_tensor(name)
            return tensor.clone()

    def fingerprint(self) -> str:
        """sha256 of config, headers and samples of every shard's data, in milliseconds.

        It tells apart models of equal shapes, unless they differ in a few tensors only.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for shard in sorted(set(self._shard_of.values())):
            with shard.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                for i in range(_SAMPLES + 1):
                    file.seek(max(0, size - _SAMPLE_BYTES) * i // _SAMPLES)
                    digest.update(file.read(_SAMPLE_BYTES))
            digest.update(f"{shard.name} {size}".encode())
        return digest.hexdigest()

    def _require(self, name: str) -> Path:
        shard = self._shard_of.get(name)
        if shard is None:
            raise SourceError(f"{self.path} holds no tensor {name}.")
        return shard

    def _shards(self) -> tuple[list[Path], dict[str, Path]]:
        """The files to read, and the index (name -> file; empty where there is none)."""
        if (self.path / SINGLE_NAME).is_file():
            return [self.path / SINGLE_NAME], {}
        if not (self.path / INDEX_NAME).is_file():
            raise SourceError(_no_weights(self.path))
        weight_map = read_json_object(self.path / INDEX_NAME).get("weight_map")
        if not isinstance(weight_map, Mapping) or not weight_map:
            raise SourceError(f"{self.path / INDEX_NAME} has no weight_map. Download it again.")
        index = {str(name): self.path / _plain_name(file) for name, file in weight_map.items()}
        shards = sorted(set(index.values()))
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing:
            raise SourceError(
                f"{INDEX_NAME} names {len(missing)} of {len(shards)} files that are not in "
                f"{self.path} ({missing[0]}, ...). Finish the download."
            )
        return shards, index

    def _read_header(self, shard: Path) -> None:
        with _open_shard(shard) as handle:
            for name in handle.keys():  # noqa: SIM118 (a file handle, not a dict)
                if name in self._shard_of:
                    first = self._shard_of[name].name
                    raise SourceError(f"Tensor {name} is in both {first} and {shard.name}.")
                part = handle.get_slice(name)
                if part.get_dtype() not in _FLOATS and name.endswith((".weight", ".bias")):
                    raise SourceError(
                        f"Tensor {name} has dtype {part.get_dtype()}; only full-precision models "
                        f"({', '.join(_FLOATS)}) can be read."
                    )
                self._shard_of[name] = shard
                self._shape_of[name] = tuple(part.get_shape())


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises SourceError if it is missing or anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(
            f"{path.parent} has no {path.name}, so it is no Hugging Face model folder."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path} cannot be read as JSON ({error}). Download it again.") from None
    if not isinstance(value, dict):
        raise SourceError(f"{path} must hold a JSON object, not a {type(value).__name__}.")
    return value


def _open_shard(path: Path) -> Any:
    try:
        # Typed Any: safetensors' handle has no usable type here.
        return safe_open(str(path), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size if path.exists() else 0
        raise SourceError(
            f"{path} ({size:,} bytes) is truncated or damaged ({error}). Download it again."
        ) from None


def _plain_name(file: object) -> str:
    """A file name from the index; anything that could leave the folder is refused."""
    name = str(file)
    if not isinstance(file, str) or name in ("", ".", "..") or set(name) & set("/\\\0:"):
        raise SourceError(
            f"{INDEX_NAME} names the file {file!r}; it must be a plain name within the folder."
        )
    if not name.endswith(".safetensors"):
        raise SourceError(f"{INDEX_NAME} names the file {file!r}, which is no safetensors file.")
    return name


def _no_weights(folder: Path) -> str:
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
    pickles = [n for n in names if n.endswith((".bin", ".pt", ".pth"))]
    if pickles:
        return (
            f"{folder} holds only pickled weights ({pickles[0]}), which can run code when opened. "
            "Convert them once, where you trust them: AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(out) of transformers writes safetensors."
        )
    if any(n.startswith("adapter_") for n in names):
        return (
            f"{folder} holds an adapter, not a model. Merge it into its base model first "
            "(merge_and_unload of peft, then save_pretrained)."
        )
    if any(n.endswith(".gguf") for n in names):
        return f"{folder} holds a GGUF file; start from the original safetensors model."
    return f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}."


def resolve_source(model: str | Path) -> Path:
    """A local folder for a path or a hub id: an existing folder is itself, an id is downloaded.

    Only configs, tokenizer files and safetensors are fetched. Raises SourceError if neither works.
    """
    path = Path(model).expanduser()
    if str(model) and path.is_dir():
        return path
    if str(model) and path.exists():
        raise SourceError(f"{model} is a file; name the folder that holds config.json.")
    name = str(model)
    parts = name.split("/")
    if len(parts) > 2 or not all(parts) or name.startswith((".", "~")) or "\\" in name:
        raise SourceError(f"There is no folder {model}, and it is no hub id like Qwen/Qwen3-0.6B.")
    from huggingface_hub import snapshot_download  # only a download needs it

    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_PATTERNS)))
    except Exception as error:  # the hub client raises its own, requests', httpx's and OS errors
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SourceError(
            f"There is no folder {model}, and the hub model {name} could not be downloaded "
            f"({type(error).__name__}: {first}). Check the name and the network, or download the "
            "model elsewhere and name its folder."
        ) from error
