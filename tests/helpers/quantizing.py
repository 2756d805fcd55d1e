"""Blocks, statistics and small jobs to test the quantization passes on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers.tiny import write_tiny_llama
from qoq.formats.kv import KVPages
from qoq.formats.scheme import FLOAT_SCHEME
from qoq.models.anatomy import EMBED, LM_HEAD, layer_prefix
from qoq.models.batch import Batch
from qoq.models.config import ModelConfig
from qoq.models.decoder import Decoder, build_decoder
from qoq.quantize.block import Block
from qoq.quantize.blocks import observe
from qoq.quantize.replay import FLOAT_KV, Replay, StreamReplay
from qoq.quantize.statistics import LayerStatistics
from qoq.tokenizer import Tokenizer

PAGE = 64


def model_tensors(model: Any) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Our config and the tensors of a transformers model, by name, tied head included."""
    raw = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    tensors = {name: t.detach().clone() for name, t in model.state_dict().items()}
    return ModelConfig.from_hf(raw), tensors


def blocks_of(config: ModelConfig, tensors: dict[str, Tensor]) -> list[Block]:
    return [Block.load(config, i, tensors.__getitem__) for i in range(config.num_layers)]


def block_of(config: ModelConfig, tensors: dict[str, Tensor], index: int = 0) -> Block:
    return Block.load(config, index, tensors.__getitem__)


def float_decoder(
    config: ModelConfig,
    tensors: dict[str, Tensor],
    blocks: list[Block],
    *,
    k_rotation: bool = False,
) -> Decoder:
    """A full-precision decoder over the blocks as they now stand, key centers included."""
    tensors = dict(tensors)
    for block in blocks:
        prefix = layer_prefix(block.index)
        tensors |= {prefix + name: t for name, t in block.tensors.items()}
        if block.k_center is not None:
            tensors[f"{prefix}self_attn.k_center"] = block.k_center
    return build_decoder(config, FLOAT_SCHEME, tensors.__getitem__, k_rotation, names=set(tensors))


def logits_of(decoder: Decoder, ids: Tensor, kv: Any = FLOAT_KV) -> Tensor:
    """fp32 [windows * length, V] of windows int64 [windows, length]."""
    config, batch = decoder.config, Batch.prefill(list(ids), PAGE)
    pages = [
        KVPages.empty(kv, batch.num_pages, config.num_kv_heads, PAGE, config.head_dim)
        for _ in decoder.layers
    ]
    return decoder(batch, pages)


def relative(got: Tensor, wanted: Tensor) -> float:
    """Largest difference as a share of the largest magnitude."""
    return float((got - wanted).abs().max() / wanted.abs().max())


def hidden_rows(
    config: ModelConfig, tensors: dict[str, Tensor], ids: Tensor, folder: Path
) -> Replay:
    """A replay whose float stream is about to enter layer 0."""
    replay = Replay(config, ids, folder, torch.device("cpu"))
    replay.hidden("float", 0).write(0, tensors[EMBED][ids.flatten()].to(torch.float32))
    return replay


def each_observed(
    config: ModelConfig,
    tensors: dict[str, Tensor],
    ids: Tensor,
    folder: Path,
    change: Callable[[Block, LayerStatistics], None],
) -> list[Block]:
    """Every block after ``change(block, its statistics)``, each fed by the float blocks before."""
    replay, blocks = hidden_rows(config, tensors, ids, folder), blocks_of(config, tensors)
    for block in blocks:
        stream = StreamReplay(replay, "float", block.float_layer(), FLOAT_KV)
        statistics = observe(block, stream)
        for chunk in replay.chunks():
            stream.finish(chunk)
        change(block, statistics)
    return blocks


def statistics_of(block: Block, rows: Tensor, folder: Path) -> LayerStatistics:
    """Statistics of a block fed with hidden rows fp32 [windows, length, H]."""
    ids = torch.zeros(rows.shape[:2], dtype=torch.int64)
    replay = Replay(block.config, ids, folder, torch.device("cpu"))
    replay.hidden("float", block.index).write(0, rows.flatten(0, 1))
    return observe(block, StreamReplay(replay, "float", block.float_layer(), FLOAT_KV))


def head_of(config: ModelConfig, tensors: dict[str, Tensor]) -> Tensor:
    return tensors[EMBED if config.tie_word_embeddings else f"{LM_HEAD}.weight"]


def correlated(rows: int, columns: int, *, rank: int = 8, noise: float = 0.2) -> Tensor:
    """Random rows fp32 whose columns depend on each other, as activations do."""
    mixed = torch.randn(rows, rank) @ torch.randn(rank, columns)
    return mixed + noise * torch.randn(rows, columns)


def write_job(folder: Path, *, characters: int = 6000, **model: Any) -> tuple[Path, Path]:
    """A tiny Llama in ``folder/model`` and a calibration text; returns both paths.

    Its weights are small enough that a 4-bit model still says nearly the same.
    """
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
    sizes |= {"initializer_range": 0.05}
    write_tiny_llama(folder / "model", **{**sizes, **model})
    text = folder / "text.txt"
    text.write_text(random_text(characters), encoding="utf-8")
    return folder / "model", text


def random_text(characters: int, seed: int = 0) -> str:
    """Printable ASCII, every character as likely; the same for the same seed."""
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(32, 127, (characters,), generator=random)
    return "".join(chr(code) for code in codes.tolist())


def text_ids(folder: Path, *, windows: int = 2, length: int = 60) -> Tensor:
    """Windows int64 [windows, length] of such a text, one that no job is calibrated with."""
    ids = Tokenizer.load(folder).encode(random_text(2 * windows * length, seed=99))
    return torch.tensor(ids[: windows * length]).reshape(windows, length)


def divergence(wanted: Tensor, got: Tensor) -> float:
    """Mean KL divergence per row of logits, in nats."""
    p, q = wanted.log_softmax(-1), got.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())
