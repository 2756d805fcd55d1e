"""Write a random-weight model of a real model's shapes, one tensor at a time.

For measuring time and memory only: its text is noise. The tokenizer is copied from a small model,
whose ids all lie within the larger vocabulary.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from qoq.models.anatomy import EMBED, FINAL_NORM, source_layer_tensors, source_tensors
from qoq.models.config import ModelConfig

SHAPES: dict[str, dict[str, object]] = {
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "llama-3-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def write_random_model(
    shapes: str, folder: Path, tokenizer: Path, layers: int | None = None
) -> None:
    """A bf16 Llama with the named shapes in ``folder``; ``layers`` keeps only the first few."""
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": 1,
        **SHAPES[shapes],
    }
    if layers is not None:
        raw["num_hidden_layers"] = layers
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
