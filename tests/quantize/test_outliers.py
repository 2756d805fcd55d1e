"""The promise about outliers, small: twins of the bundled model keep QoQ's accuracy.

docs/outliers.md holds the full measurement (benchmarks/outliers.py).
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.families import VARIANTS, write_family_model
from helpers.outliers import KEY_BIAS, KINDS, Outliers, shorten, write_qwen2, write_twin
from helpers.quantizing import logits_of, relative, statistics_of
from helpers.tiny import write_tiny_llama
from qoq.checkpoint.hf import HFSource
from qoq.evaluate.perplexity import Reference, Result, evaluate
from qoq.evaluate.simulate import Calibrated, simulate
from qoq.evaluate.texts import Text, read_text, windows
from qoq.formats.kv import dequantize_heads, quantize_heads
from qoq.models.load import load_model
from qoq.quantize.block import Block
from qoq.quantize.keys import key_center, smooth_attention
from qoq.quantize.recipe import QOQ, RTN, Recipe
from qoq.tokenizer import Tokenizer

MODEL = Path(__file__).parents[2] / "examples" / "books-llama"
SCHEME = "w4a8kv4-g128"
BYTES = 60_000  # of each text: enough, and quickly encoded


@pytest.mark.parametrize("kind", [*KINDS, "all"])
@pytest.mark.parametrize("name", VARIANTS)
def test_twins_answer_as_the_original_in_full_precision(
    name: str, kind: str, tmp_path: Path
) -> None:
    write_family_model(tmp_path / "model", name, num_hidden_layers=2)
    kinds = tuple(KINDS) if kind == "all" else (kind,)
    outliers = Outliers(kinds=kinds, seed=int(torch.randint(1000, ())), channels=3)
    twin = write_twin(tmp_path / "model", tmp_path / "twin", outliers)
    ids = torch.randint(0, 211, (2, 33))
    original, changed = load_model(tmp_path / "model"), load_model(twin)
    wanted = logits_of(original.decoder, ids)
    assert relative(logits_of(changed.decoder, ids), wanted) < 1e-4
    one, other = original.decoder.layers[0], changed.decoder.layers[0]
    assert (
        relative(other.qkv.weight, one.qkv.weight)
        + relative(other.gate_up.weight, one.gate_up.weight)
        + (0 if one.k_norm is None else relative(other.k_norm, one.k_norm))
        > 0.5
    )


def test_a_seed_makes_one_twin(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "model")
    files = [
        (write_twin(tmp_path / "model", tmp_path / str(i), outliers) / "model.safetensors")
        for i, outliers in enumerate([Outliers(), Outliers(), Outliers(seed=1)])
    ]
    one, same, other = (file.read_bytes() for file in files)
    assert one == same
    assert one != other


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model's first two layers: weights as training makes them, in a third of the time.

    Rounding to nearest is judged by its KL here: a model so short has little perplexity to lose.
    """
    return shorten(MODEL, tmp_path_factory.mktemp("short") / "model", layers=2)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    text = read_text(MODEL / "heldout.txt").content[:BYTES]
    return windows(Text("heldout", text), Tokenizer.load(MODEL), 1024, 1)


def judge(source: Path, ids: Tensor, *recipes: Recipe) -> Iterator[Result]:
    """Full precision, then each recipe beside it."""
    text = source.parent / "calibration.txt"
    text.write_text(read_text(MODEL / "calibration.txt").content[:BYTES], encoding="utf-8")
    calibrated = Calibrated(str(text), samples=4, seq_len=512)
    full = load_model(source)
    yield evaluate(full, ids)
    reference = Reference(full, ids)
    for recipe in recipes:
        yield evaluate(simulate(source, SCHEME, recipe, calibrated), ids, reference)


@pytest.fixture(scope="module")
def original(model: Path, ids: Tensor) -> Result:
    return list(judge(model, ids, QOQ))[1]


def kl(result: Result) -> float:
    assert result.kl_mean is not None
    return result.kl_mean


def test_the_combined_twin_ruins_nearest_and_leaves_qoq_as_it_was(
    model: Path, ids: Tensor, original: Result, tmp_path: Path
) -> None:
    twin = write_twin(model, tmp_path / "twin", Outliers(seed=17))
    _, rtn, qoq = judge(twin, ids, RTN, QOQ)
    assert kl(rtn) > 10 * kl(qoq)
    assert qoq.perplexity < 1.01 * original.perplexity
    assert kl(qoq) < 1.3 * kl(original)


def test_biased_keys_as_in_qwen2(
    model: Path, ids: Tensor, original: Result, tmp_path: Path
) -> None:
    twin = write_qwen2(model, tmp_path / "twin", seed=17, layers=2)
    full, rtn, qoq = judge(twin, ids, RTN, QOQ)
    assert kl(rtn) > 5 * kl(qoq)
    assert qoq.perplexity < 1.01 * full.perplexity
    assert kl(qoq) < 1.5 * kl(original)  # a foreign theta is part of it


def test_attention_over_biased_keys(ids: Tensor, tmp_path: Path) -> None:
    """Layer 0 of the Qwen2 twin: attention probabilities over 4-bit keys, as they are and ours."""
    twin = write_qwen2(MODEL, tmp_path / "twin", seed=5)
    model = load_model(twin)
    block = Block.load(model.config, 0, HFSource(twin).get)
    rows = model.decoder.embed[ids].reshape(4, 256, -1)
    stats = statistics_of(block, rows, tmp_path)
    keys = stats.sample("keys")
    assert 0.85 * KEY_BIAS < keys.abs().amax() < 1.2 * KEY_BIAS
    assert (keys.mean(0).abs() > 0.7 * KEY_BIAS).sum() == 8
    center = key_center(block, stats)
    factor = smooth_attention(block, stats, QOQ.smooth_attention, 4, center)
    ours = coded((keys - center) / factor) * factor + center
    noise = keys.std(0).mean()
    assert (coded(keys) - keys).square().mean().sqrt() > noise  # nothing of a key is left
    assert (ours - keys).square().mean().sqrt() < 0.25 * noise


def coded(keys: Tensor) -> Tensor:
    return dequantize_heads(quantize_heads(keys, 4), 4)
