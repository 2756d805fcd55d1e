"""CheckpointWriter: a packed checkpoint, shard by finished shard, published by one rename.

One shard per finished layer makes an interrupted run resumable: what ``shards()`` lists is whole.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qoq.checkpoint.files import atomic_file, disk_errors, dump_json, is_plain_name
from qoq.checkpoint.manifest import parse_manifest
from qoq.checkpoint.partial import PartialFolder
from qoq.checkpoint.shard import TensorEntry, read_header, write_tensors
from qoq.errors import CheckpointError, CheckpointPathError, CheckpointTensorError

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SHARD_SUFFIX = ".safetensors"
MAX_SHARD_BYTES = 2 << 30
# Files beside a model's weights that a converted model still needs.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
)


def companion_files(folder: str | Path) -> dict[str, bytes | Path]:
    """name -> path of the tokenizer, generation and licence files that ``folder`` holds."""
    paths = {name: Path(folder) / name for name in COMPANIONS}
    return {name: path for name, path in paths.items() if path.is_file()}


class CheckpointWriter:
    """Writes OUT by way of ``OUT.partial`` (see PartialFolder for ``overwrite`` and ``resume``).

    Memory is bounded by the tensors of one ``write_shard`` call, files by ``max_shard_bytes``
    (a single larger tensor gets a file of its own). The same calls give the same bytes.
    A full disk raises ResourceError. Nothing is called OUT, or listed as a shard, before it is
    whole.
    """

    def __init__(
        self,
        out: str | Path,
        *,
        overwrite: bool = False,
        resume: bool = False,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        self._folder = PartialFolder(out, overwrite=overwrite, resume=resume)
        self._max_shard_bytes = max_shard_bytes

    @property
    def out(self) -> Path:
        """The folder that will appear."""
        return self._folder.out

    @property
    def partial(self) -> Path:
        """Where shards lie until then. A caller's own notes here are deleted by ``finish``."""
        return self._folder.path

    def shards(self) -> list[str]:
        """The file names given to finished ``write_shard`` calls, sorted; a damaged one is not
        listed, so it will be made again.
        """
        return [name for name in self._files() if not _is_part(name)]

    def write_shard(self, filename: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors to ``filename``; when this returns, they survive a power cut.

        More than ``max_shard_bytes`` are spread over ``<stem>.part1.safetensors`` and so on,
        written before ``filename`` itself. An earlier shard of that name is replaced.
        """
        if not is_plain_name(filename) or not filename.endswith(SHARD_SUFFIX) or _is_part(filename):
            raise CheckpointPathError(
                f"A shard's name is plain and ends in {SHARD_SUFFIX}; {filename!r} does not."
            )
        (self.partial / filename).unlink(missing_ok=True)
        stem = filename.removesuffix(SHARD_SUFFIX)
        for stale in self.partial.glob("*.part*" + SHARD_SUFFIX):
            if stale.name.startswith(f"{stem}.part"):
                stale.unlink()
        first, *rest = self._split(tensors)
        for number, part in enumerate(rest, 1):
            write_tensors(self.partial / f"{stem}.part{number}{SHARD_SUFFIX}", part)
        write_tensors(self.partial / filename, first)

    def finish(
        self,
        raw_config: Mapping[str, Any],
        quantization_config: Mapping[str, Any],
        extra_files: Mapping[str, bytes | Path] | None = None,
    ) -> Path:
        """Add index, extra files and config.json, and publish. Returns OUT.

        ``raw_config`` is the source's config.json; ``tie_word_embeddings`` becomes false, because
        our checkpoints store the head. Raises CheckpointTensorError for a tensor in two shards.
        """
        parse_manifest(quantization_config)
        extra = dict(extra_files or {})
        headers = self._files()
        index = _index(headers)
        own = {CONFIG_NAME, INDEX_NAME, *headers}
        for name in extra:
            if not is_plain_name(name) or name in own or name.endswith(SHARD_SUFFIX):
                raise CheckpointPathError(f"An extra file cannot be called {name!r}.")
        for name, content in extra.items():
            with atomic_file(self.partial / name) as file:
                if isinstance(content, bytes):
                    file.write(content)
                else:
                    with open(content, "rb") as source:
                        shutil.copyfileobj(source, file)
        config = {
            **raw_config,
            "tie_word_embeddings": False,
            "quantization_config": dict(quantization_config),
        }
        for name, value in ((INDEX_NAME, index), (CONFIG_NAME, config)):
            with atomic_file(self.partial / name) as file:
                file.write(dump_json(value))
        return self._folder.publish({*own, *extra})

    def _split(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Consecutive parts of at most ``max_shard_bytes``; at least one, maybe empty."""
        parts: list[dict[str, Tensor]] = [{}]
        used = 0
        for name in sorted(tensors):
            size = tensors[name].numel() * tensors[name].element_size()
            if parts[-1] and used + size > self._max_shard_bytes:
                parts.append({})
                used = 0
            parts[-1][name] = tensors[name]
            used += size
        return parts

    def _files(self) -> dict[str, dict[str, TensorEntry]]:
        """Every whole shard file, parts too, with its header, by sorted name."""
        headers = {}
        with disk_errors(self.partial):
            names = sorted(e.name for e in os.scandir(self.partial) if e.is_file())
            for name in names:
                if not name.endswith(SHARD_SUFFIX):
                    continue
                try:
                    headers[name] = read_header(self.partial / name)
                except CheckpointError:
                    (self.partial / name).unlink()
        return headers


def _is_part(name: str) -> bool:
    stem, _, number = name.removesuffix(SHARD_SUFFIX).rpartition(".part")
    return bool(stem) and number.isdecimal()


def _index(headers: Mapping[str, Mapping[str, TensorEntry]]) -> dict[str, Any]:
    """The content of model.safetensors.index.json."""
    weight_map: dict[str, str] = {}
    total = 0
    for file, entries in headers.items():
        for name, entry in entries.items():
            if name in weight_map:
                raise CheckpointTensorError(
                    f"Tensor {name} is in both {weight_map[name]} and {file}."
                )
            weight_map[name] = file
            total += entry.nbytes
    if not weight_map:
        raise CheckpointTensorError("There is no tensor to publish; write shards first.")
    return {"metadata": {"total_size": total}, "weight_map": weight_map}
