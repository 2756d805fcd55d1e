"""Output smoothing and reordering: invisible in full precision, and they do what they are for."""

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
from qoq.formats.scheme import QuantScheme
from qoq.models.config import ModelConfig
from qoq.quantize.block import Block
from qoq.quantize.grids import make_grid
from qoq.quantize.outputs import reorder, smooth_output
from qoq.quantize.recipe import DOWN_PROJ, O_PROJ, QOQ
from qoq.quantize.rotate import rotate_heads
from qoq.quantize.statistics import LayerStatistics

G32 = QuantScheme.parse("w4a8kv4-g32")
CONSUMERS = (O_PROJ, DOWN_PROJ)
SMALL = ("llama-mha", "llama-biased", "qwen2", "qwen3-windows-biased")


def model_of(name: str) -> tuple[ModelConfig, dict[str, Tensor], Tensor]:
    config, tensors = model_tensors(make_family_model(name, num_hidden_layers=2))
    return config, tensors, torch.randint(0, config.vocab_size, (2, 40))


def observed(name: str, folder: Path) -> tuple[Block, LayerStatistics, Tensor]:
    config, tensors, _ = model_of(name)
    block, rows = block_of(config, tensors), torch.randn(3, 48, config.hidden_size)
    return block, statistics_of(block, rows, folder), rows


def again(block: Block, rows: Tensor, folder: Path) -> LayerStatistics:
    (folder / "again").mkdir()
    return statistics_of(block, rows, folder / "again")


@pytest.mark.parametrize("name", VARIANTS)
def test_smoothing_and_reordering_change_no_logits(name: str, tmp_path: Path) -> None:
    config, tensors, ids = model_of(name)
    wanted = logits_of(float_decoder(config, tensors, []), ids)

    def change(block: Block, stats: LayerStatistics) -> None:
        for consumer in CONSUMERS:
            before = block.weight(consumer)
            smooth_output(block, stats, consumer, ((0.6, 0.3),), G32)
            assert relative(block.weight(consumer), before) > 0.01
        rotate_heads(block)
        for consumer in CONSUMERS:
            before = block.weight(consumer)
            reorder(block, stats, consumer)
            assert not torch.equal(block.weight(consumer), before)

    blocks = each_observed(config, tensors, ids, tmp_path, change)
    assert relative(logits_of(float_decoder(config, tensors, blocks), ids), wanted) < 1e-4


@pytest.mark.parametrize("name", SMALL)
def test_smoothing_chosen_by_data_changes_no_logits(name: str, tmp_path: Path) -> None:
    config, tensors, ids = model_of(name)
    wanted = logits_of(float_decoder(config, tensors, []), ids)

    def change(block: Block, stats: LayerStatistics) -> None:
        for consumer in CONSUMERS:
            smooth_output(block, stats, consumer, QOQ.smooth_output_alphas, G32)

    blocks = each_observed(config, tensors, ids, tmp_path, change)
    assert relative(logits_of(float_decoder(config, tensors, blocks), ids), wanted) < 1e-4


@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.parametrize("name", SMALL)
def test_statistics_follow_the_passes(name: str, consumer: str, tmp_path: Path) -> None:
    """What the next pass reads is what observing the changed block would give."""
    block, stats, rows = observed(name, tmp_path)
    smooth_output(block, stats, consumer, ((0.8, 0.4),), G32)
    if consumer == O_PROJ:
        rotate_heads(block)
        stats.rotate_heads(O_PROJ)
    reorder(block, stats, consumer)
    fresh = again(block, rows, tmp_path)
    for name_ in ("values", *CONSUMERS):
        torch.testing.assert_close(stats.sample(name_), fresh.sample(name_), rtol=1e-3, atol=1e-4)
    for name_ in CONSUMERS:
        torch.testing.assert_close(stats.absmax[name_], fresh.absmax[name_], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_smoothing_undoes_outlier_channels(consumer: str, tmp_path: Path) -> None:
    """Producer channels times 60, divided out of the consumer: the choice divides them back."""
    config, tensors, _ = model_of("llama-gqa-linear")
    block, rows = block_of(config, tensors), torch.randn(3, 48, config.hidden_size)
    plain = weight_and_input_error(block, statistics_of(block, rows, tmp_path), consumer)
    grow(block, consumer, 60.0)
    (tmp_path / "grown").mkdir()
    stats = statistics_of(block, rows, tmp_path / "grown")
    spoilt = weight_and_input_error(block, stats, consumer)
    smooth_output(block, stats, consumer, QOQ.smooth_output_alphas, G32)
    rescued = weight_and_input_error(block, stats, consumer)
    assert spoilt > 5 * plain
    assert rescued < 1.5 * plain


def grow(block: Block, consumer: str, by: float) -> None:
    config = block.config
    if consumer == DOWN_PROJ:
        factor = torch.ones(config.intermediate_size)
        factor[[7, 40, 101]] = by
        block.scale_outputs("mlp.up_proj", factor)
        block.scale_inputs(consumer, 1 / factor)
        return
    factor = torch.ones(config.num_kv_heads, config.head_dim)
    factor[:, [1, 6]] = by
    block.scale_outputs("self_attn.v_proj", factor.flatten())
    group = config.num_heads // config.num_kv_heads
    block.scale_inputs(consumer, 1 / factor.repeat_interleave(group, dim=0).flatten())


def weight_and_input_error(block: Block, stats: LayerStatistics, consumer: str) -> float:
    """Relative output error of an int8 x g32 product, all rounded to nearest."""
    x, weight = stats.sample(consumer), block.weight(consumer)
    step = x.abs().amax(1, keepdim=True) / 127
    grid = make_grid(weight, G32.weight, None)
    got = (x / step).round() * step @ grid.values(grid.codes(weight)).T
    return relative_power(got, x @ weight.T)


def relative_power(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("scheme", ["w4a8kv4-g32", "w4a8kv4", "w8a8", "w16a16k16v4"])
@pytest.mark.parametrize("consumer", CONSUMERS)
def test_doing_nothing_is_chosen_where_every_factor_hurts(
    consumer: str, scheme: str, tmp_path: Path
) -> None:
    block, stats, _ = observed("qwen2", tmp_path)
    before = dict(block.tensors)
    wild = ((9.0, 0.0), (-9.0, 0.0))  # makes some channels enormous
    smooth_output(block, stats, consumer, wild, QuantScheme.parse(scheme))
    assert block.notes[f"smooth {consumer}"] == [0.0, 0.0]
    assert all(torch.equal(before[name], t) for name, t in block.tensors.items())


def test_factor_follows_its_formula(tmp_path: Path) -> None:
    block, stats, _ = observed("llama-mha", tmp_path)
    before, x = block.weight(DOWN_PROJ), stats.absmax[DOWN_PROJ]
    raw = x**0.7 / before.abs().amax(0) ** 0.2
    wanted = raw / raw.log().mean().exp()
    smooth_output(block, stats, DOWN_PROJ, ((0.7, 0.2),), G32)
    torch.testing.assert_close(block.weight(DOWN_PROJ), before * wanted, rtol=1e-4, atol=1e-6)


def test_dead_channels_are_left_alone(tmp_path: Path) -> None:
    config, tensors, _ = model_of("llama-mha")
    tensors["model.layers.0.mlp.up_proj.weight"][3] = 0
    tensors["model.layers.0.mlp.down_proj.weight"][:, 5] = 0
    block = block_of(config, tensors)
    stats = statistics_of(block, torch.randn(2, 40, config.hidden_size), tmp_path)
    up = block.weight("mlp.up_proj")
    smooth_output(block, stats, DOWN_PROJ, ((0.5, 0.5),), G32)
    assert all(torch.isfinite(t).all() for t in block.tensors.values())
    assert torch.equal(block.weight("mlp.up_proj")[[3, 5]], up[[3, 5]])


@pytest.mark.parametrize("name", ["llama-mha", "llama-gqa-linear", "qwen2"])
def test_reordering_sorts_channels(name: str, tmp_path: Path) -> None:
    block, stats, rows = observed(name, tmp_path)
    for consumer in CONSUMERS:
        reorder(block, stats, consumer)
    fresh, config = again(block, rows, tmp_path), block.config
    assert (fresh.absmax[DOWN_PROJ].diff() >= -1e-5).all()
    heads = fresh.absmax[O_PROJ].reshape(config.num_kv_heads, -1, config.head_dim).amax(1)
    assert (heads.diff(dim=1) >= -1e-5).all()
