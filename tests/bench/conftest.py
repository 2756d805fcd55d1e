"""A model small enough to measure in a test."""

from dataclasses import replace

import pytest

from qoq.bench.shapes import config_of
from qoq.models.config import ModelConfig


@pytest.fixture
def small() -> ModelConfig:
    config = config_of("llama-3.2-1b", 2)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 300}
    return replace(config, num_heads=2, num_kv_heads=1, **sizes)
