"""Shapes of real models, by name: those of QServe's tables, and two families that came after."""

from typing import Any

from qoq.errors import RequestError
from qoq.models.config import ModelConfig

_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
)
_ROWS: dict[str, tuple[Any, ...]] = {
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 64, 128256, True),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128, 128256, False),
    "llama-3-70b": (8192, 28672, 80, 64, 8, 128, 128256, False),
    "llama-2-7b": (4096, 11008, 32, 32, 32, 128, 32000, False),
    "llama-2-13b": (5120, 13824, 40, 40, 40, 128, 32000, False),
    "llama-2-70b": (8192, 28672, 80, 64, 8, 128, 32000, False),
    "llama-30b": (6656, 17920, 60, 52, 52, 128, 32000, False),
    "mistral-7b": (4096, 14336, 32, 32, 8, 128, 32000, False),
    "yi-34b": (7168, 20480, 60, 56, 8, 128, 64000, False),
    "qwen1.5-72b": (8192, 24576, 80, 64, 64, 128, 152064, False),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 128, 152064, False),
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 64, 151936, True),
}
SHAPES = tuple(_ROWS)


def raw_config(shape: str, layers: int | None = None) -> dict[str, Any]:
    """A Hugging Face ``config.json`` with these shapes; ``layers`` keeps only the first few.

    Raises RequestError for a name that is not in SHAPES.
    """
    if shape not in _ROWS:
        raise RequestError(f"There is no shape {shape!r}; there are {', '.join(SHAPES)}.")
    family = ("Qwen2ForCausalLM", "qwen2") if "qwen" in shape else ("LlamaForCausalLM", "llama")
    raw = {
        "architectures": [family[0]],
        "model_type": family[1],
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": 1,
        **dict(zip(_FIELDS, _ROWS[shape], strict=True)),
    }
    return raw if layers is None else {**raw, "num_hidden_layers": layers}


def config_of(shape: str, layers: int | None = None) -> ModelConfig:
    """The ModelConfig of a named shape."""
    return ModelConfig.from_hf(raw_config(shape, layers))
