"""Write a random-weight model of a real model's shapes, one tensor at a time.

For measuring time and memory only: its text is noise. The tokenizer is copied from a small model,
whose ids all lie within the larger vocabulary.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from qoq.bench.shapes import raw_config
from qoq.models.anatomy import EMBED, FINAL_NORM, source_layer_tensors, source_tensors
from qoq.models.config import ModelConfig

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def write_random_model(
    shapes: str, folder: Path, tokenizer: Path, layers: int | None = None
) -> None:
    """A bf16 Llama with the named shapes in ``folder``; ``layers`` keeps only the first few."""
    raw = raw_config(shapes, layers)
    config = ModelConfig.from_hf(raw)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    expected = source_tensors(config)
    groups = [[EMBED]]
    groups += [list(source_layer_tensors(config, i)) for i in range(config.num_layers)]
    groups += [[name for name in expected if name == FINAL_NORM or name.startswith("lm_head")]]
    weight_map: dict[str, str] = {}
    for number, names in enumerate(groups):
        file = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        save_file({n: _random(n, expected[n], generator) for n in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer / name, folder / name)


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    scale = 0.02 if name == EMBED else shape[1] ** -0.5
    return (torch.randn(shape, generator=generator) * scale).to(torch.bfloat16)
