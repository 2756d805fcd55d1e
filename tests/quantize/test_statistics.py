"""Running statistics equal those of all tokens at once, however the tokens come in chunks."""

from pathlib import Path

import pytest
import torch

from helpers.families import make_family_model
from helpers.quantizing import block_of, model_tensors, statistics_of
from qoq.kernels.kv_append import apply_rope
from qoq.models.rope import cos_sin
from qoq.quantize import blocks, replay
from qoq.quantize.block import Block
from qoq.quantize.report import summarize
from qoq.quantize.statistics import LayerStatistics


def a_block(name: str = "llama-gqa-linear") -> Block:
    return block_of(*model_tensors(make_family_model(name)))


@pytest.mark.parametrize("cuts", [[40], [1, 39], [13, 13, 14]])
def test_chunks_change_nothing(cuts: list[int]) -> None:
    config = a_block().config
    q = torch.randn(40, config.num_heads, config.head_dim)
    k, v = torch.randn(2, 40, config.num_kv_heads, config.head_dim)
    x = torch.randn(40, 30)
    cos, sin = cos_sin(config.rope, torch.arange(40))
    stats = LayerStatistics(config, stride=1)
    for part in torch.arange(40).split(cuts):
        stats.add_heads(q[part], k[part], v[part], cos[part], sin[part])
        stats.add_inputs("mlp.down_proj", x[part])
    turned_q, turned_k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
    grouped = turned_q.reshape(40, config.num_kv_heads, -1, config.head_dim)
    assert stats.tokens == 40
    assert stats.k_sum is not None
    assert stats.q_moment is not None
    torch.testing.assert_close(stats.k_sum.float(), k.sum(0), rtol=1e-5, atol=1e-5)
    moment = torch.einsum("thgd,thge->hde", grouped, grouped)
    torch.testing.assert_close(stats.q_moment, moment, rtol=1e-4, atol=1e-4)
    assert torch.equal(stats.absmax["k"], turned_k.abs().amax(0))
    assert torch.equal(stats.absmax["q"], grouped.abs().amax((0, 2)))
    assert torch.equal(stats.absmax["mlp.down_proj"], x.abs().amax(0))
    assert torch.equal(stats.sample("keys"), turned_k)
    assert torch.equal(stats.sample("values"), v)
    assert torch.equal(stats.sample("mlp.down_proj"), x)


def test_samples_do_not_grow_with_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "SAMPLE_TOKENS", 50)
    monkeypatch.setattr(replay, "CHUNK_TOKENS", 64)
    block = a_block()
    for windows in (2, 20):
        folder = tmp_path / str(windows)
        folder.mkdir()
        rows = torch.randn(windows, 32, block.config.hidden_size)
        stats = statistics_of(block, rows, folder)
        assert stats.tokens == windows * 32
        for name in ("keys", "values", "self_attn.o_proj", "mlp.down_proj"):
            assert 40 <= len(stats.sample(name)) <= 80


def test_observing_in_chunks_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, found = a_block("qwen3-windows-biased"), []
    rows = torch.randn(5, 24, block.config.hidden_size)
    for tokens in (4096, 50, 1):
        monkeypatch.setattr(replay, "CHUNK_TOKENS", tokens)
        (tmp_path / str(tokens)).mkdir()
        found.append(statistics_of(block, rows, tmp_path / str(tokens)))
    for other in found[1:]:
        for name in found[0].absmax:
            torch.testing.assert_close(
                other.absmax[name], found[0].absmax[name], rtol=1e-4, atol=1e-5
            )
        for name in found[0].samples:
            torch.testing.assert_close(
                other.sample(name), found[0].sample(name), rtol=1e-4, atol=1e-5
            )
        torch.testing.assert_close(other.q_moment, found[0].q_moment, rtol=1e-4, atol=1e-3)


def test_the_summary_shows_keys_as_they_would_be_coded(tmp_path: Path) -> None:
    block = a_block()
    stats = statistics_of(block, torch.randn(2, 40, block.config.hidden_size), tmp_path)
    keys = stats.sample("keys")
    before = summarize(block, stats)
    assert before["key_absmax"] == pytest.approx(keys.abs().amax(0).flatten().tolist(), abs=1e-4)
    assert before["key_range"]["max"] == pytest.approx(float((keys.amax(-1) - keys.amin(-1)).max()))
    block.k_center = keys.mean(0)
    block.k_rotation = torch.linalg.qr(torch.randn(16, 16)).Q
    after = summarize(block, stats)
    coded = (keys - block.k_center) @ block.k_rotation
    assert after["key_absmax"] == pytest.approx(coded.abs().amax(0).flatten().tolist(), abs=1e-4)
    assert after["value_range"] == before["value_range"]
