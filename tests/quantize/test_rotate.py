"""Folding norms and rotating change nothing in full precision, on every family."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from helpers.families import VARIANTS, make_family_model
from helpers.quantizing import blocks_of, float_decoder, head_of, logits_of, model_tensors, relative
from qoq.formats.hadamard import hadamard_matrix
from qoq.models.anatomy import EMBED, FINAL_NORM, LM_HEAD, NORM_READERS
from qoq.models.config import ModelConfig
from qoq.quantize import rotate
from qoq.quantize.block import Block


def model_of(name: str) -> tuple[ModelConfig, dict[str, Tensor], Tensor]:
    config, tensors = model_tensors(make_family_model(name, num_hidden_layers=2))
    return config, tensors, torch.randint(0, config.vocab_size, (2, 21))


@pytest.mark.parametrize("name", VARIANTS)
def test_folding_norms_changes_no_logits(name: str) -> None:
    config, tensors, ids = model_of(name)
    wanted = logits_of(float_decoder(config, tensors, []), ids)
    blocks = blocks_of(config, tensors)
    for block in blocks:
        rotate.fold_norms(block)
        for norm in NORM_READERS:
            assert torch.equal(block.tensors[f"{norm}.weight"], torch.ones(config.hidden_size))
    assert relative(logits_of(float_decoder(config, tensors, blocks), ids), wanted) < 1e-4


@pytest.mark.parametrize("name", VARIANTS)
def test_rotating_the_whole_model_changes_no_logits(name: str) -> None:
    """Embedding, blocks and head, the tied ones untied."""
    config, tensors, ids = model_of(name)
    wanted = logits_of(float_decoder(config, tensors, []), ids)
    blocks = blocks_of(config, tensors)
    for block in blocks:
        rotate.fold_norms(block)
        rotate.rotate_residual(block)
    head = rotate.rotate_rows(head_of(config, tensors) * tensors[FINAL_NORM])
    turned = {
        **tensors,
        EMBED: rotate.rotate_rows(tensors[EMBED]),
        f"{LM_HEAD}.weight": head,
        FINAL_NORM: torch.ones(config.hidden_size),
    }
    untied = replace(config, tie_word_embeddings=False)
    decoder = float_decoder(untied, turned, blocks)
    assert relative(logits_of(decoder, ids), wanted) < 1e-4
    # It did turn: the embedding is another one, and the old head would not do.
    assert relative(turned[EMBED], tensors[EMBED]) > 0.1
    wrong = float_decoder(untied, {**turned, EMBED: tensors[EMBED]}, blocks)
    assert relative(logits_of(wrong, ids), wanted) > 1e-2


@pytest.mark.parametrize("name", VARIANTS)
def test_rotating_heads_changes_no_logits(name: str) -> None:
    config, tensors, ids = model_of(name)
    wanted = logits_of(float_decoder(config, tensors, []), ids)
    blocks = blocks_of(config, tensors)
    for block in blocks:
        before = block.weight("self_attn.v_proj")
        rotate.rotate_heads(block)
        assert relative(block.weight("self_attn.v_proj"), before) > 0.1
    assert relative(logits_of(float_decoder(config, tensors, blocks), ids), wanted) < 1e-4


@pytest.mark.parametrize("name", ["llama-mha", "llama-biased", "qwen3-d256"])
def test_rotating_keys_changes_no_logits(name: str) -> None:
    config, tensors, ids = model_of(name)
    wanted = logits_of(float_decoder(config, tensors, []), ids)
    decoder = float_decoder(config, tensors, [], k_rotation=True)
    assert relative(logits_of(decoder, ids), wanted) < 1e-4


@pytest.mark.parametrize("size", [12, 64, 96, 128, 160])
def test_rotating_rows_is_the_product_with_the_matrix(size: int) -> None:
    x = torch.randn(5, size, dtype=torch.float64)
    got = rotate.rotate_rows(x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, (x @ hadamard_matrix(size)).float(), rtol=1e-6, atol=1e-6)


def test_rotation_by_slices_of_rows_is_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(23, 32)
    whole = rotate.rotate_rows(x)
    monkeypatch.setattr(rotate, "ROWS", 7)
    assert torch.equal(rotate.rotate_rows(x), whole)


def test_rotation_spreads_a_norm_gain_outlier() -> None:
    """What the pass is for: one large input channel no longer rules its row."""
    config, tensors = model_tensors(make_family_model("llama-mha", num_hidden_layers=1))
    tensors["model.layers.0.input_layernorm.weight"][5] = 80.0
    block = Block.load(config, 0, tensors.__getitem__)
    rotate.fold_norms(block)
    q = block.weight("self_attn.q_proj")
    spiky = (q.abs().amax(1) / q.square().mean(1).sqrt()).mean()
    rotate.rotate_residual(block)
    q = block.weight("self_attn.q_proj")
    assert (q.abs().amax(1) / q.square().mean(1).sqrt()).mean() < spiky / 3
