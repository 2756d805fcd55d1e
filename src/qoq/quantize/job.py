"""Job: one quantization's partial folder, what of it is finished, and how far it has come."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qoq.checkpoint.files import atomic_file, dump_json
from qoq.checkpoint.hf import HFSource
from qoq.checkpoint.manifest import make_manifest
from qoq.checkpoint.writer import CheckpointWriter, companion_files
from qoq.errors import CheckpointError
from qoq.formats.scheme import QuantScheme
from qoq.models.anatomy import EMBED
from qoq.models.config import ModelConfig
from qoq.quantize.blocks import BLOCK_STEPS
from qoq.quantize.calibration import Calibration
from qoq.quantize.ends import ROWS
from qoq.quantize.recipe import Recipe
from qoq.quantize.replay import Replay
from qoq.quantize.report import REPORT_NAME

Progress = Callable[[int, int, str], None]
"""progress(done, total, what): after every finished step; ``what`` names the step."""

JOB_NAME = "job.json"
EMBEDDING = -1  # the "layer" before the first


@dataclass(frozen=True)
class Settings:
    """What a result depends on besides the source."""

    scheme: QuantScheme
    recipe: Recipe
    calibration: Calibration | None
    seed: int
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "scheme": self.scheme.name,
            "lm_head_bits": self.scheme.lm_head.bits,
            "recipe": self.recipe.to_dict(),
            "calibration": self.calibration.to_dict() if self.calibration else None,
            "seed": self.seed,
            "dtype": self.dtype,
        }


class Job:
    """The files of ``OUT.partial``: a shard and notes per finished layer, and the streams' rows.

    Making one claims the folder: CheckpointError if it holds another job's unfinished work.
    """

    def __init__(
        self,
        writer: CheckpointWriter,
        source: HFSource,
        config: ModelConfig,
        settings: Settings,
        device: torch.device,
        progress: Progress | None,
    ) -> None:
        self._writer, self._source, self._config = writer, source, config
        self._settings, self._progress = settings, progress
        texts = settings.calibration
        self.replay = Replay(config, texts.ids, writer.partial, device) if texts else None
        self._steps = len(BLOCK_STEPS) if texts else 1
        self._done = 0
        self._claim()
        self._ready = self._count_ready()

    def finished(self, index: int) -> bool:
        """Whether an interrupted run made this layer (or EMBEDDING); counts its steps if so."""
        if index + 1 >= self._ready:
            return False
        what = "embedding" if index == EMBEDDING else f"{self._name(index)}: finished before"
        self._advance(1 if index == EMBEDDING else self._steps, what)
        return True

    def step(self, index: int, what: str) -> None:
        """A part of a layer is done."""
        self._advance(1, f"{self._name(index)}: {what}")

    def write_embedding(self, table: Tensor) -> None:
        """Store the embedding; the first layer's input rows of both streams are its rows."""
        if self.replay:
            flat = self.replay.ids.reshape(-1)
            for stream in self._streams():
                file = self.replay.hidden(stream, 0)
                file.delete()
                for start in range(0, len(flat), ROWS):
                    file.write(start, table[flat[start : start + ROWS]])
        self._writer.write_shard(self._shard(EMBEDDING), {EMBED: table})
        self._advance(1, "embedding")

    def write_layer(self, index: int, tensors: dict[str, Tensor], notes: dict[str, object]) -> None:
        """Store a layer; its shard on disk marks it finished, and its input rows have served."""
        with atomic_file(self._notes(index)) as file:
            file.write(dump_json(notes))
        if self.replay:
            for stream in self._streams():
                self.replay.hidden(stream, index + 1).sync()
        self._writer.write_shard(self._shard(index), tensors)
        if self.replay:
            for stream in self._streams():
                self.replay.hidden(stream, index).delete()
        else:
            self.step(index, "packed")

    def write_head(self, tensors: dict[str, Tensor]) -> None:
        """Store the final norm and lm_head."""
        self._writer.write_shard(self._shard(self._config.num_layers), tensors)
        self._advance(1, "lm_head")

    def publish(self) -> Path:
        """Add report, manifest and companion files; the partial folder becomes OUT (its path)."""
        settings = self._settings
        turned = settings.recipe.rotate_keys and settings.scheme.kv.k_bits < 16
        data = settings.to_dict()
        manifest = make_manifest(
            settings.scheme,
            k_rotation="hadamard" if turned else None,
            recipe=data["recipe"],
            seed=settings.seed,
            calibration=data["calibration"],
        )
        layers = [json.loads(self._notes(i).read_bytes()) for i in range(self._config.num_layers)]
        report = {"job": {"source": self._source.path.name, **data}, "layers": layers}
        files = {**companion_files(self._source.path), REPORT_NAME: dump_json(report)}
        return self._writer.finish(self._source.config, manifest, files)

    def _claim(self) -> None:
        claim = {"source_sha256": self._source.fingerprint(), **self._settings.to_dict()}
        path = self._writer.partial / JOB_NAME
        if path.is_file() and json.loads(path.read_bytes()) != claim:
            raise CheckpointError(
                f"{self._writer.partial} holds an unfinished quantization with other settings. "
                "Finish that one, use --no-resume to start over, or choose another output folder."
            )
        with atomic_file(path) as file:
            file.write(dump_json(claim))

    def _count_ready(self) -> int:
        """How many shards, embedding first, need not be made again.

        None at all where the next layer's input rows were lost (a tidied folder): only the layers
        before can make them.
        """
        there = set(self._writer.shards())
        names = [self._shard(i) for i in range(EMBEDDING, self._config.num_layers)]
        count = next((n for n, name in enumerate(names) if name not in there), len(names))
        if self.replay and 0 < count < len(names):
            rows = [self.replay.hidden(stream, count - 1) for stream in self._streams()]
            if not all(file.holds(self.replay.tokens) for file in rows):
                return 0
        return count

    def _streams(self) -> tuple[str, ...]:
        return ("float", "quant") if self._settings.recipe.compensate else ("quant",)

    def _shard(self, index: int) -> str:
        return f"model-{index + 2:05d}-of-{self._config.num_layers + 2:05d}.safetensors"

    def _notes(self, index: int) -> Path:
        return self._writer.partial / f"notes-{index:05d}.json"

    def _name(self, index: int) -> str:
        return f"layer {index + 1}/{self._config.num_layers}"

    def _advance(self, steps: int, what: str) -> None:
        self._done += steps
        if self._progress:
            total = 2 + self._config.num_layers * self._steps
            self._progress(self._done, total, what)
