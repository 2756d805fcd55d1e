"""Packed checkpoints of random numbers that the format allows."""

import json
from pathlib import Path

import torch
from torch import Tensor

from helpers.tiny import write_tiny_llama
from qoq.checkpoint.manifest import make_manifest
from qoq.checkpoint.writer import CheckpointWriter, companion_files
from qoq.formats.scheme import QuantScheme
from qoq.models.anatomy import packed_tensors
from qoq.models.config import ModelConfig


def random_packed_tensors(
    config: ModelConfig, scheme: QuantScheme, *, k_center: bool = True
) -> dict[str, Tensor]:
    """Random tensors for every name a packed checkpoint of this scheme holds."""
    tensors: dict[str, Tensor] = {}
    for name, (shape, dtype) in packed_tensors(config, scheme, k_center).items():
        if name.endswith("codes"):
            low = -127 if dtype == torch.int8 else 0
            tensors[name] = torch.randint(low, 127, shape).to(dtype or torch.uint8)
        elif name.endswith("group_scale"):
            tensors[name] = torch.randint(1, 9, shape).to(torch.uint8)
        elif name.endswith("group_offset"):
            tensors[name] = torch.randint(-119, -30, shape).to(torch.int8)
        elif name.endswith("channel_scale") or (name.endswith("scale") and dtype is not None):
            tensors[name] = torch.rand(shape) * 0.004 + 0.001
        else:
            spread = 0.02 if name.endswith("offset") else 0.5
            tensors[name] = torch.randn(shape) * spread + (1.0 if "norm" in name else 0.0)
    return tensors


def write_random_packed(
    folder: Path, scheme: str = "w4a8kv4-g32", *, context: int = 512, norm: float = 0.05
) -> Path:
    """A packed checkpoint of random codes, with a tiny Llama's shape and tokenizer.

    ``norm`` scales the last norm: a small one keeps the likeliest tokens below probability 1.
    """
    write_tiny_llama(folder / "source")
    raw = json.loads((folder / "source" / "config.json").read_text())
    raw["max_position_embeddings"] = context
    parsed = QuantScheme.parse(scheme)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        tensors = random_packed_tensors(ModelConfig.from_hf(raw), parsed)
    tensors["model.norm.weight"] *= norm
    writer = CheckpointWriter(folder / "out")
    writer.write_shard("model.safetensors", tensors)
    return writer.finish(raw, make_manifest(parsed), companion_files(folder / "source"))
