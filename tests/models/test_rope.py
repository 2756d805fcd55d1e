"""Cosines and sines equal transformers' for every type; a row depends on its position alone."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from qoq.models.config import ModelConfig
from qoq.models.rope import RopeConfig, cos_sin, inverse_frequencies

SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 2.5},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 96,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
        "mscale": 0.7,
        "mscale_all_dim": 0.3,
    },
    {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 0.9,
    },
]


def theirs(rope: LlamaRotaryEmbedding, positions: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = rope(torch.zeros(1), positions[None])
    half = cos.shape[-1] // 2
    return cos[0, :, :half], sin[0, :, :half]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_equals_transformers(scaling: dict[str, Any], head_dim: int) -> None:
    hf = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=128,
        rope_parameters={"rope_theta": 20000.0, **scaling},
    )
    config = ModelConfig.from_hf({**hf.to_dict(), "architectures": ["LlamaForCausalLM"]}).rope
    rope = LlamaRotaryEmbedding(hf)
    positions = torch.arange(128)
    for ours, wanted in zip(cos_sin(config, positions), theirs(rope, positions), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)
    # Beyond the context, one token at a time, as generation does.
    for position in (128, 129, 200, 1000):
        at = torch.tensor([position])
        for ours, wanted in zip(cos_sin(config, at), theirs(rope, at), strict=True):
            torch.testing.assert_close(ours, wanted, rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", ["default", "dynamic", "yarn"])
def test_rows_do_not_depend_on_the_batch(kind: str) -> None:
    config = RopeConfig(64, 1e4, kind, 4.0, 100)
    positions = torch.randint(0, 1000, (257,))
    cos, sin = cos_sin(config, positions)
    for i in torch.randint(0, 257, (20,)).tolist():
        one_cos, one_sin = cos_sin(config, positions[i : i + 1])
        assert torch.equal(one_cos[0], cos[i])
        assert torch.equal(one_sin[0], sin[i])


def test_shapes_and_empty_batches() -> None:
    config = RopeConfig(96)
    assert inverse_frequencies(config).shape == (48,)
    cos, sin = cos_sin(config, torch.zeros(0, dtype=torch.int64))
    assert cos.shape == sin.shape == (0, 48)
    cos, sin = cos_sin(config, torch.tensor([0]))
    assert torch.equal(cos, torch.ones(1, 48))
    assert torch.equal(sin, torch.zeros(1, 48))


def test_scaling_changes_something() -> None:
    plain = inverse_frequencies(RopeConfig(64))
    for kind in ("linear", "llama3", "yarn"):
        scaled = inverse_frequencies(RopeConfig(64, 1e4, kind, 4.0, 64))
        assert (scaled <= plain).all()
        assert not torch.equal(scaled, plain), kind
