"""Perplexity equals transformers'; KL equals its definition; memory knobs change nothing."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qoq.errors import TextError
from qoq.evaluate import perplexity
from qoq.evaluate.perplexity import Reference, evaluate, kl_rows
from qoq.evaluate.texts import read_text
from qoq.evaluate.texts import windows as cut
from qoq.formats.scheme import KVFormat
from qoq.models.load import LoadedModel, load_model
from qoq.tokenizer import Tokenizer

BUNDLED = Path(__file__).parents[2] / "examples" / "books-llama"


def random_windows(model: LoadedModel, count: int, length: int) -> Tensor:
    return torch.randint(0, model.config.vocab_size, (count, length))


def all_logprobs(model: LoadedModel, windows: Tensor) -> Tensor:
    """fp64 [n, seq_len - 1, V], at once and by the plainest means."""
    from qoq.kvcache.pool import KVPool
    from qoq.models.batch import Batch

    config, rows = model.config, []
    for window in windows:
        batch = Batch.prefill([window], 16)
        shape = (config.num_layers, batch.num_pages, config.num_kv_heads, 16, config.head_dim)
        pool = KVPool(model.scheme.kv, *shape)
        rows.append(model.decoder(batch, pool.layers)[:-1].double().log_softmax(-1))
    return torch.stack(rows)


@pytest.fixture(scope="module")
def model(tiny: Path) -> LoadedModel:
    return load_model(tiny)


@pytest.fixture(scope="module")
def rough(tiny: Path) -> LoadedModel:
    """The same model over a 4-bit cache: near, not equal."""
    return load_model(tiny, kv=KVFormat(4, 4))


def test_the_bundled_model_equals_transformers_to_four_digits() -> None:
    from transformers import AutoModelForCausalLM

    text = read_text(BUNDLED / "heldout.txt")
    windows = cut(text, Tokenizer.load(BUNDLED), 512, 3)
    result = evaluate(load_model(BUNDLED), windows)
    hf = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)
    with torch.no_grad():
        losses = [float(hf(window[None], labels=window[None]).loss) for window in windows]
    assert result.tokens == 3 * 511
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / 3), rel=2e-5)
    assert 10 < result.perplexity < 200
    assert (result.kl_mean, result.kl_p99, result.top1_agreement) == (None, None, None)


@pytest.mark.parametrize(("count", "length"), [(1, 2), (3, 33), (2, 64)])
def test_figures_are_their_definitions(
    model: LoadedModel, rough: LoadedModel, count: int, length: int
) -> None:
    windows = random_windows(model, count, length)
    result = evaluate(rough, windows, model)
    own, ideal = all_logprobs(rough, windows), all_logprobs(model, windows)
    loss = -own.gather(2, windows[:, 1:, None]).mean()
    kl = (ideal.exp() * (ideal - own)).sum(-1).flatten().numpy()
    assert result.tokens == count * (length - 1)
    assert result.perplexity == pytest.approx(float(loss.exp()), rel=1e-5)
    assert result.kl_mean == pytest.approx(kl.mean(), rel=1e-3, abs=1e-6)
    assert result.kl_p99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-3, abs=1e-6)
    agreement = (own.argmax(-1) == ideal.argmax(-1)).double().mean()
    assert result.top1_agreement == pytest.approx(float(agreement))


def test_the_direction_of_kl_is_from_the_reference(model: LoadedModel, rough: LoadedModel) -> None:
    windows = random_windows(model, 2, 40)
    forward, back = evaluate(rough, windows, model), evaluate(model, windows, rough)
    assert forward.kl_mean is not None
    assert back.kl_mean is not None
    assert forward.kl_mean > 0
    assert forward.kl_mean != pytest.approx(back.kl_mean, rel=1e-4)


def test_a_kept_reference_is_a_live_one(model: LoadedModel, rough: LoadedModel) -> None:
    windows = random_windows(model, 3, 37)
    seen: list[tuple[int, int]] = []
    reference = Reference(model, windows, progress=lambda *at: seen.append(at))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    live = evaluate(rough, windows, model)
    for _ in range(2):  # it serves more than once
        assert evaluate(rough, windows, reference) == live
    reference.close()


def test_a_model_is_no_distance_from_itself(model: LoadedModel) -> None:
    result = evaluate(model, random_windows(model, 2, 30), model)
    assert (result.kl_mean, result.kl_p99, result.top1_agreement) == (0, 0, 1)


def test_chunks_do_not_matter(
    model: LoadedModel, rough: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = random_windows(model, 2, 50)
    whole = evaluate(rough, windows, model)
    monkeypatch.setattr(perplexity, "CHUNK_BYTES", 7 * 4 * model.config.vocab_size)
    pieces = evaluate(rough, windows, model)
    assert pieces.perplexity == pytest.approx(whole.perplexity, rel=1e-6)
    assert pieces.kl_mean == pytest.approx(whole.kl_mean, rel=1e-4)
    assert pieces.top1_agreement == whole.top1_agreement


def test_progress_counts_windows(model: LoadedModel) -> None:
    seen: list[tuple[int, int]] = []
    evaluate(model, random_windows(model, 2, 5), progress=lambda *at: seen.append(at))
    assert seen == [(1, 2), (2, 2)]


def test_kl_of_known_distributions() -> None:
    p = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    q = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    wanted = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert kl_rows(p, q).tolist() == pytest.approx([wanted, 0.0], abs=1e-7)


def test_what_cannot_be_judged_is_refused(model: LoadedModel) -> None:
    with pytest.raises(TextError, match="at least one window"):
        evaluate(model, torch.zeros(0, 8, dtype=torch.int64))
    with pytest.raises(TextError, match="at least one window"):
        evaluate(model, torch.zeros(3, 1, dtype=torch.int64))
    with pytest.raises(TextError, match="knows only"):
        evaluate(model, torch.full((1, 4), model.config.vocab_size))
    with pytest.raises(TextError, match="context"):
        evaluate(model, torch.zeros(1, model.config.max_positions + 1, dtype=torch.int64))
    other = replace(model, config=replace(model.config, vocab_size=7))
    with pytest.raises(TextError, match="one vocabulary"):
        evaluate(model, torch.zeros(1, 4, dtype=torch.int64), other)
    reference = Reference(model, torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="other windows"):
        evaluate(model, torch.ones(1, 4, dtype=torch.int64), reference)


def test_a_hopeless_model_has_infinite_perplexity(model: LoadedModel) -> None:
    head = replace(model.decoder.lm_head, weight=model.decoder.lm_head.weight * 1e6)  # type: ignore[operator]
    broken = replace(model, decoder=replace(model.decoder, lm_head=head))
    assert evaluate(broken, random_windows(model, 1, 20)).perplexity == math.inf
