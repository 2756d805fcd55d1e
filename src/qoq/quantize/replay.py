"""Replay: calibration tokens through one block at a time, their hidden states kept on disk.

Two streams run side by side: the full-precision model's and that of the model quantized so far.
Each stage of a block is computed once per stream, in chunks; between stages rows lie in files, so
memory does not grow with the amount of text.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qoq.checkpoint.files import disk_errors
from qoq.formats.activation import QuantizedActivation
from qoq.formats.kv import KVPages
from qoq.formats.scheme import FLOAT_SCHEME, KVFormat
from qoq.kernels.act_quant import Activation, act_quant
from qoq.models.batch import Batch
from qoq.models.config import ModelConfig
from qoq.models.decoder import DecoderLayer, Observe
from qoq.models.rope import cos_sin

CHUNK_TOKENS = 1024
PAGE_SIZE = 64


class RowFile:
    """fp32 rows [T, width] in a file, read and written by slices (no mapping: bounded memory)."""

    def __init__(self, path: Path, width: int) -> None:
        self.path, self.width = path, width

    def write(self, start: int, rows: Tensor) -> None:
        data = rows.detach().to("cpu", torch.float32).contiguous().numpy()
        mode = "r+b" if self.path.exists() else "w+b"
        with disk_errors(self.path.parent), self.path.open(mode) as file:
            file.seek(start * self.width * 4)
            file.write(data.data)

    def read(self, rows: slice, device: torch.device) -> Tensor:
        count = (rows.stop - rows.start) * self.width
        data = np.fromfile(self.path, np.float32, count, offset=rows.start * self.width * 4)
        return torch.from_numpy(data).reshape(-1, self.width).to(device)

    def holds(self, tokens: int) -> bool:
        return self.path.is_file() and self.path.stat().st_size == tokens * self.width * 4

    def sync(self) -> None:
        """Flush to disk: a layer counts as finished only with its output rows safe."""
        with disk_errors(self.path.parent), self.path.open("rb") as file:
            os.fsync(file.fileno())

    def delete(self) -> None:
        self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Chunk:
    """Some whole windows: their rows in the files, and what the decoder needs to run them."""

    rows: slice
    batch: Batch
    cos: Tensor
    sin: Tensor


class Replay:
    """Chunks of the calibration ids int64 [samples, seq_len], the same for every layer."""

    def __init__(
        self, config: ModelConfig, ids: Tensor, folder: Path, device: torch.device
    ) -> None:
        self.config, self.ids, self.folder, self.device = config, ids, folder, device
        self.tokens = ids.numel()
        self._windows = max(1, CHUNK_TOKENS // ids.shape[1])

    def chunks(self) -> Iterator[Chunk]:
        seq_len = self.ids.shape[1]
        for first in range(0, self.ids.shape[0], self._windows):
            windows = self.ids[first : first + self._windows]
            batch = Batch.prefill(list(windows), PAGE_SIZE, self.device)
            cos, sin = cos_sin(self.config.rope, batch.positions)
            start = first * seq_len
            yield Chunk(slice(start, start + windows.numel()), batch, cos, sin)

    def file(self, name: str, width: int) -> RowFile:
        return RowFile(self.folder / f"{name}.rows", width)

    def hidden(self, stream: str, layer: int) -> RowFile:
        """Input rows of a layer; those of layer ``num_layers`` enter the final norm."""
        return self.file(f"hidden-{layer:05d}-{stream}", self.config.hidden_size)

    def pages(self, kv: KVFormat) -> KVPages:
        """One layer's scratch pages, enough for any chunk."""
        config, per_window = self.config, -(-self.ids.shape[1] // PAGE_SIZE)
        count = per_window * min(self._windows, self.ids.shape[0])
        return KVPages.empty(
            kv, count, config.num_kv_heads, PAGE_SIZE, config.head_dim, device=self.device
        )


class StreamReplay:
    """One stream (``name`` "float" or "quant") through one block, stage after stage.

    ``layer`` is replaced by the caller as its linears become packed; each stage uses what earlier
    stages left in files: mixed (entering o_proj) and residual (after attention).
    """

    def __init__(self, replay: Replay, name: str, layer: DecoderLayer, kv: KVFormat) -> None:
        config = replay.config
        self.replay, self.layer = replay, layer
        self.input = replay.hidden(name, layer.index)
        self.output = replay.hidden(name, layer.index + 1)
        self._mixed = replay.file(f"mixed-{name}", config.q_size)
        self._residual = replay.file(f"residual-{name}", config.hidden_size)
        self._pages = replay.pages(kv)

    def qkv_input(self, chunk: Chunk) -> tuple[Activation, Tensor]:
        """What enters qkv, and the residual stream before attention."""
        return self.layer.attention_input(self.input.read(chunk.rows, self.replay.device), None)

    def o_input(self, chunk: Chunk, observe: Observe | None = None) -> tuple[Activation, Tensor]:
        """What enters o_proj, and the residual stream it is added to; runs attention."""
        entering, residual = self.qkv_input(chunk)
        mixed = self.layer.attend(
            entering, chunk.cos, chunk.sin, chunk.batch, self._pages, observe=observe
        )
        self._mixed.write(chunk.rows.start, values(mixed))
        return mixed, residual

    def gate_up_input(self, chunk: Chunk) -> tuple[Activation, Tensor]:
        """What enters gate_up, and the residual stream after attention."""
        device = self.replay.device
        # Quantizing dequantized int8 rows again gives the same codes: absmax is code 127 itself.
        mixed = act_quant(self._mixed.read(chunk.rows, device), self.layer.o.act_bits)
        entering, residual = self.layer.mlp_input(
            self.layer.o(mixed), self.input.read(chunk.rows, device)
        )
        self._residual.write(chunk.rows.start, residual)
        return entering, residual

    def down_input(self, chunk: Chunk) -> tuple[Activation, Tensor]:
        """What enters down_proj, and the residual stream it is added to."""
        stream = self._residual.read(chunk.rows, self.replay.device)
        entering, residual = self.layer.mlp_input(stream, None)
        return self.layer.mlp_hidden(entering), residual

    def finish(self, chunk: Chunk) -> None:
        """Write the block's output rows, the next layer's input."""
        hidden, residual = self.down_input(chunk)
        self.output.write(chunk.rows.start, residual + self.layer.down(hidden))

    def clean(self) -> None:
        self._mixed.delete()
        self._residual.delete()


def values(x: Activation) -> Tensor:
    """fp32 rows of an activation."""
    return x.dequantize() if isinstance(x, QuantizedActivation) else x


Stage = Callable[[StreamReplay, Chunk], tuple[Activation, Tensor]]
# Linear input -> the stage that computes it, in the order a token meets them.
STAGES: dict[str, Stage] = {
    "qkv_proj": StreamReplay.qkv_input,
    "o_proj": StreamReplay.o_input,
    "gate_up_proj": StreamReplay.gate_up_input,
    "down_proj": StreamReplay.down_input,
}
FLOAT_KV = FLOAT_SCHEME.kv
