"""One tiny random model per supported family and variant, made by transformers."""

from pathlib import Path
from typing import Any

import torch

# name -> (transformers class stem, config changes). Sizes are odd on purpose.
_LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
_WINDOWS = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-mha": ("Llama", {"num_key_value_heads": 6}),
    "llama-gqa-linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "llama-dynamic-d80": (
        "Llama",
        {
            "head_dim": 80,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        },
    ),
    "llama3.1-d128": ("Llama", {"head_dim": 128, "rope_parameters": _LLAMA31}),
    "llama3.2-tied-d64": (
        "Llama",
        {"head_dim": 64, "rope_parameters": _LLAMA31, "tie_word_embeddings": True},
    ),
    "llama-yarn": ("Llama", {"rope_parameters": _YARN}),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral-window-d96": ("Mistral", {"head_dim": 96, "sliding_window": 9}),
    "mistral-no-window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2-windows-tied": ("Qwen2", {**_WINDOWS, "tie_word_embeddings": True}),
    "qwen2.5-yarn": ("Qwen2", {"rope_parameters": _YARN}),
    "qwen3-d256": ("Qwen3", {"head_dim": 256}),
    "qwen3-windows-biased": ("Qwen3", {"head_dim": 32, "attention_bias": True, **_WINDOWS}),
}


def make_family_model(name: str, *, seed: int | None = None, **changes: Any) -> Any:
    """A transformers model in fp32 of variant ``name``, weights, gains and biases all random."""
    import transformers

    stem, variant = VARIANTS[name]
    settings: dict[str, Any] = {
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 211,
        "max_position_embeddings": 128,
        "initializer_range": 0.15,
        **variant,
        **changes,
    }
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(torch.seed() if seed is None else seed)
        config = getattr(transformers, f"{stem}Config")(**settings)
        config._attn_implementation = "eager"
        model = getattr(transformers, f"{stem}ForCausalLM")(config).float().eval()
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
            elif parameter_name.endswith(".bias"):
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def write_family_model(folder: Path, name: str, **changes: Any) -> Any:
    """Save such a model as a Hugging Face folder and return it."""
    model = make_family_model(name, **changes)
    model.save_pretrained(folder)
    return model
