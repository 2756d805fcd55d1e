"""Key centering and SmoothAttention: invisible in full precision, and they do what they are for."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.families import VARIANTS, make_family_model
from helpers.quantizing import (
    block_of,
    each_observed,
    float_decoder,
    logits_of,
    model_tensors,
    relative,
    statistics_of,
)
from qoq.formats.affine import affine_dequantize, affine_quantize
from qoq.formats.hadamard import hadamard_matrix
from qoq.kernels.kv_append import apply_rope
from qoq.models.config import ModelConfig
from qoq.models.rope import cos_sin
from qoq.quantize import keys
from qoq.quantize.block import Block
from qoq.quantize.keys import key_center, smooth_attention
from qoq.quantize.recipe import QOQ
from qoq.quantize.statistics import LayerStatistics

SMALL = ("llama-mha", "llama-biased", "qwen2", "qwen3-windows-biased")


def model_of(name: str) -> tuple[ModelConfig, dict[str, Tensor], Tensor]:
    config, tensors = model_tensors(make_family_model(name, num_hidden_layers=2))
    return config, tensors, torch.randint(0, config.vocab_size, (2, 40))


def observed(name: str, folder: Path) -> tuple[Block, LayerStatistics]:
    config, tensors, _ = model_of(name)
    block = block_of(config, tensors)
    return block, statistics_of(block, torch.randn(3, 48, config.hidden_size), folder)


@pytest.mark.parametrize("name", VARIANTS)
def test_centering_and_smoothing_change_no_logits(name: str, tmp_path: Path) -> None:
    config, tensors, ids = model_of(name)
    wanted = logits_of(float_decoder(config, tensors, []), ids)

    def change(block: Block, stats: LayerStatistics) -> None:
        center = key_center(block, stats)
        before = dict(block.tensors)
        factor = smooth_attention(block, stats, ((0.7, 0.3),), 4, center)
        block.k_center = center / factor
        assert factor.max() / factor.min() > 1.05
        assert any(not torch.equal(before[n], block.tensors[n]) for n in before)

    blocks = each_observed(config, tensors, ids, tmp_path, change)
    assert relative(logits_of(float_decoder(config, tensors, blocks), ids), wanted) < 1e-4


@pytest.mark.parametrize("name", SMALL)
def test_smoothing_chosen_by_data_changes_no_logits(name: str, tmp_path: Path) -> None:
    config, tensors, ids = model_of(name)
    wanted = logits_of(float_decoder(config, tensors, []), ids)

    def change(block: Block, stats: LayerStatistics) -> None:
        smooth_attention(block, stats, QOQ.smooth_attention, 4, None)

    blocks = each_observed(config, tensors, ids, tmp_path, change)
    assert relative(logits_of(float_decoder(config, tensors, blocks), ids), wanted) < 1e-4


@pytest.mark.parametrize("name", SMALL)
def test_any_center_at_all_changes_no_logits(name: str) -> None:
    """Softmax cannot see a vector that is taken off every key."""
    config, tensors, ids = model_of(name)
    wanted = logits_of(float_decoder(config, tensors, []), ids)
    block = block_of(config, tensors)
    block.k_center = torch.randn(config.num_kv_heads, config.head_dim)
    assert relative(logits_of(float_decoder(config, tensors, [block]), ids), wanted) < 1e-4


@pytest.mark.parametrize("name", ["llama-gqa-linear", "llama3.1-d128", "qwen2.5-yarn", "qwen2"])
def test_center_is_the_mean_key_at_every_position(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Brute force: turn each observed key to each position, average all of it."""
    monkeypatch.setattr(keys, "CENTER_CONTEXT", 70)
    config, tensors, _ = model_of(name)
    block, rows = block_of(config, tensors), torch.randn(2, 33, config.hidden_size)
    center = key_center(block, statistics_of(block, rows, tmp_path))
    layer = block.float_layer()
    entering, _ = layer.attention_input(rows.flatten(0, 1), None)
    _, k, _ = layer._split_heads(layer.qkv(entering))
    length = min(70, config.max_positions)
    cos, sin = cos_sin(config.rope, torch.arange(length))
    total = torch.zeros(config.num_kv_heads, config.head_dim, dtype=torch.float64)
    for row in k:
        turned = apply_rope(row.expand(length, -1, -1), cos, sin)
        total += turned.sum(dim=0, dtype=torch.float64)
    wanted = (total / (length * len(k))).float()
    torch.testing.assert_close(center, wanted, rtol=1e-4, atol=1e-5)


def test_center_is_averaged_over_no_more_than_the_context(tmp_path: Path) -> None:
    block, stats = observed("qwen2", tmp_path)
    assert block.config.max_positions < keys.CENTER_CONTEXT
    assert stats.k_sum is not None
    short = key_center(block, stats)
    mean = (stats.k_sum / stats.tokens).float()
    cos, sin = cos_sin(block.config.rope, torch.arange(block.config.max_positions))
    turned = apply_rope(mean.expand(len(cos), -1, -1), cos, sin).mean(0)
    torch.testing.assert_close(short, turned, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_factors_are_equal_within_rope_pairs_and_one_on_average(name: str, tmp_path: Path) -> None:
    block, stats = observed(name, tmp_path)
    factor = smooth_attention(block, stats, ((0.9, 0.2),), 4, None)
    half = block.config.head_dim // 2
    assert factor.shape == (block.config.num_kv_heads, block.config.head_dim)
    assert torch.equal(factor[:, :half], factor[:, half:])
    torch.testing.assert_close(factor.log().mean(1), torch.zeros(len(factor)), atol=1e-5, rtol=0)
    assert factor.std() > 0.01
    if block.config.qk_norm:
        assert torch.equal(factor, factor[:1].expand_as(factor))


def test_factor_follows_its_formula(tmp_path: Path) -> None:
    block, stats = observed("llama-gqa-linear", tmp_path)
    half = block.config.head_dim // 2
    k, q = (stats.absmax[n].unflatten(1, (2, half)).amax(1) for n in "kq")
    raw = k**0.7 / q**0.3
    wanted = raw / raw.log().mean(1, keepdim=True).exp()
    factor = smooth_attention(block, stats, ((0.7, 0.3),), 4, None)
    torch.testing.assert_close(factor[:, :half], wanted, rtol=1e-4, atol=1e-5)


def grow_pair(block: Block, head: int, pair: int, by: float) -> None:
    """Make one RoPE pair of a head's keys large, its queries small."""
    config, half = block.config, block.config.head_dim // 2
    factor = torch.ones(config.num_kv_heads, config.head_dim)
    factor[head, [pair, pair + half]] = by
    group = config.num_heads // config.num_kv_heads
    block.scale_outputs("self_attn.k_proj", factor.flatten())
    block.scale_outputs("self_attn.q_proj", 1 / factor.repeat_interleave(group, dim=0).flatten())


def test_the_choice_is_made_per_head_and_undoes_an_outlier(tmp_path: Path) -> None:
    config, tensors, _ = model_of("llama-gqa-linear")
    block = block_of(config, tensors)
    grow_pair(block, 1, 3, 25.0)
    rows = torch.randn(3, 48, config.hidden_size)
    stats = statistics_of(block, rows, tmp_path)
    spiky = stats.absmax["k"][1].amax() / stats.absmax["k"][1].median()
    error = score_error(stats, 4)
    smooth_attention(block, stats, QOQ.smooth_attention, 4, None)
    chosen = block.notes["smooth_attention"]
    assert isinstance(chosen, list)
    assert len(chosen) == config.num_kv_heads
    assert chosen[1] != [0.0, 0.0]
    (tmp_path / "after").mkdir()
    after = statistics_of(block, rows, tmp_path / "after")
    assert after.absmax["k"][1].amax() / after.absmax["k"][1].median() < spiky / 4
    assert score_error(after, 4)[1] < error[1] / 10


def score_error(stats: LayerStatistics, bits: int) -> Tensor:
    """Mean squared error of q.k per KV head, keys coded; nothing of the pass's own code."""
    k = stats.sample("keys")
    error = affine_dequantize(*affine_quantize(k, bits)) - k
    assert stats.q_moment is not None
    return torch.einsum("nhd,hde,nhe->h", error, stats.q_moment, error) / len(k)


@pytest.mark.parametrize("rotated", [False, True])
def test_a_choice_is_never_worse_than_doing_nothing(rotated: bool, tmp_path: Path) -> None:
    block, stats = observed("llama-biased", tmp_path)
    eye = torch.eye(block.config.head_dim)
    turn = hadamard_matrix(block.config.head_dim).float() if rotated else eye
    block.k_rotation = turn if rotated else None
    sampled = stats.sample("keys")
    center = key_center(block, stats)

    def error(factor: Tensor) -> Tensor:
        moved = (sampled - center) / factor @ turn
        back = affine_dequantize(*affine_quantize(moved, 4))
        off = (back - moved) @ turn.T * factor
        assert stats.q_moment is not None
        return torch.einsum("nhd,hde,nhe->h", off, stats.q_moment, off)

    nothing = error(torch.ones_like(center))
    factor = smooth_attention(block, stats, QOQ.smooth_attention, 4, center)
    assert (error(factor) <= nothing * 1.0001).all()
    if factor.ne(1).any():  # a random layer may leave nothing to gain
        assert error(factor).sum() < nothing.sum()


def test_doing_nothing_is_chosen_where_every_factor_hurts(tmp_path: Path) -> None:
    block, stats = observed("llama-gqa-linear", tmp_path)
    before = dict(block.tensors)
    # beta alone makes small-query channels of the keys huge: worse than nothing at 4 bits.
    factor = smooth_attention(block, stats, ((0.0, -9.0), (0.0, 9.0)), 4, None)
    assert torch.equal(factor, torch.ones_like(factor))
    assert block.notes["smooth_attention"] == [[0.0, 0.0]] * block.config.num_kv_heads
    assert all(torch.equal(before[name], t) for name, t in block.tensors.items())


def test_heads_with_q_and_k_norms_share_one_choice(tmp_path: Path) -> None:
    block, stats = observed("qwen3-windows-biased", tmp_path)
    q, k = block.weight("self_attn.q_proj"), block.weight("self_attn.k_proj")
    gain = block.tensors["self_attn.k_norm.weight"]
    factor = smooth_attention(block, stats, QOQ.smooth_attention, 4, None)
    chosen = block.notes["smooth_attention"]
    assert isinstance(chosen, list)
    assert all(pair == chosen[0] for pair in chosen)
    assert block.weight("self_attn.q_proj") is q  # a norm would undo a factor put in the weights
    assert block.weight("self_attn.k_proj") is k
    torch.testing.assert_close(block.tensors["self_attn.k_norm.weight"], gain / factor[0])


def test_sampled_keys_follow_the_factor(tmp_path: Path) -> None:
    block, stats = observed("qwen2", tmp_path)
    before = stats.sample("keys")
    factor = smooth_attention(block, stats, ((0.6, 0.0),), 4, None)
    torch.testing.assert_close(stats.sample("keys"), before / factor)


@pytest.mark.parametrize("level", [0.0, 1e30])
def test_dead_or_huge_channels_give_finite_factors(level: float, tmp_path: Path) -> None:
    block, stats = observed("llama-gqa-linear", tmp_path)
    stats.absmax["k"][:, 0] = level
    stats.absmax["k"][:, block.config.head_dim // 2] = level
    factor = smooth_attention(block, stats, ((1.0, 0.0),), 4, None)
    assert torch.isfinite(factor).all()
    assert (factor > 0).all()


def test_keys_constant_but_for_a_little_are_rescued_by_centering() -> None:
    """Qwen2's first layer: biased channels of size 167 swallow a 4-bit code's whole range."""
    half, tokens = 32, 512
    k = torch.randn(tokens, 1, 2 * half)
    bias = torch.zeros(2 * half)
    bias[[24, 27, 29, 31, 56, 60, 62, 63]] = torch.tensor([167.0, -160, 150, -167, 171, 5, 90, 167])
    cos = 1e6 ** -(torch.arange(half) / half) * torch.arange(tokens)[:, None]
    turned = apply_rope(k + bias, cos.cos(), cos.sin())
    center = turned.mean(0)

    def error(x: Tensor) -> float:
        return float((affine_dequantize(*affine_quantize(x, 4)) - x).square().mean())

    assert error(turned) > 10  # a step is (167 + 167) / 15: nothing of the rest survives
    assert error(turned - center) < error(turned) / 100
