"""examples/training: a tiny model trained, interrupted, resumed, and loaded by everyone else."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from qoq.kvcache.pool import KVPool
from qoq.models.batch import Batch
from qoq.models.load import load_model

FOLDER = Path(__file__).parents[1] / "examples" / "training"
TEXT = "It was the best of times, it was the worst of times. A tale of two cities, told anew.\n"
SIZES = {"hidden": 32, "inner": 48, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 16}
PLAN = {"context": 64, "vocab": 300, "epochs": 3, "batch": 4, "length": 32, "rate": 0.01}


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("train")
    finally:
        sys.path.remove(str(FOLDER))
        for name in ("train", "corpus", "llama"):
            sys.modules.pop(name, None)


@pytest.fixture
def books(tmp_path: Path) -> Path:
    folder = tmp_path / "books"
    folder.mkdir()
    (folder / "one.txt").write_text(TEXT * 40 + "\n<cut>\n" + TEXT * 9, encoding="utf-8")
    (folder / "two.txt").write_text("Café, naïve: ünïcødé. " * 30, encoding="utf-8")
    return folder


def run(script: ModuleType, books: Path, out: Path, **options: Any) -> list[dict[str, Any]]:
    given = {"device": "cpu", "heldout": books / "one.txt", "separator": "<cut>", **options}
    values = {**SIZES, **PLAN, **given}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    script.main([str(books), "-o", str(out), *flags])
    history: list[dict[str, Any]] = json.loads((out / "training.json").read_text())
    return history


def test_it_learns_and_others_load_it(
    script: ModuleType, books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(script, "SHARD_BYTES", (64 << 10) + 9000)
    out = tmp_path / "out"
    history = run(script, books, out)
    assert [row["epoch"] for row in history] == [1, 2, 3]
    assert history[-1]["heldout_ppl"] < history[0]["heldout_ppl"] < 300
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 2
    # One tensor alone may be larger than a shard should be.
    assert all(file.stat().st_size < 70 << 10 for file in shards)
    assert not (out / "training.pt").exists()
    assert not out.with_name("out.partial").exists()

    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer("worst, naïve\n中").input_ids) == "worst, naïve\n中"
    ids = tokenizer("it was the worst of times. A tale").input_ids
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    loaded = load_model(out)
    weights = {n: t.float() for n, t in theirs.state_dict().items() if n != "lm_head.weight"}
    own = script.Llama(script.Shape(vocab=loaded.config.vocab_size, context=64, **SIZES))
    own.load_state_dict(weights)
    own.eval()
    with torch.no_grad():
        want = theirs(torch.tensor([ids])).logits[0]
        mine = own(torch.tensor([ids]))[0]
    torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-4)
    batch = Batch.prefill([ids], 16)
    pool = KVPool(loaded.scheme.kv, 2, batch.num_pages, 1, 16, 16)
    torch.testing.assert_close(loaded.decoder(batch, pool.layers), want, rtol=1e-4, atol=1e-4)


def test_an_interrupted_run_goes_on_to_the_same_weights(
    script: ModuleType, books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    run(script, books, straight)
    plain = script.step_loss
    steps = 0

    def fails(model: Any, batch: torch.Tensor) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == 9:
            raise KeyboardInterrupt
        return plain(model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(script, "step_loss", fails)
        with pytest.raises(KeyboardInterrupt):
            run(script, books, broken, save_seconds=0)
    assert not broken.exists()
    with pytest.raises(SystemExit, match="other sizes"):
        run(script, books, broken, epochs=4)
    history = run(script, books, broken)
    assert len(history) == 3
    for file in straight.glob("*.safetensors"):
        assert file.read_bytes() == (broken / file.name).read_bytes()
    with pytest.raises(SystemExit, match="there already"):
        run(script, books, broken)


def test_time_ends_it(script: ModuleType, books: Path, tmp_path: Path) -> None:
    history = run(script, books, tmp_path / "out", minutes=1e-9, epochs=1000)
    assert [row["epoch"] for row in history] == [None]
    assert (tmp_path / "out" / "config.json").is_file()


def test_windows_and_texts(script: ModuleType, books: Path, tmp_path: Path) -> None:
    corpus = sys.modules["corpus"]
    assert len(corpus.read_texts(books)) == 2
    assert len(corpus.read_texts(books, "<cut>")) == 3
    ids = torch.arange(103)
    first, again, other = (corpus.windows(ids, 10, 5, epoch) for epoch in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other[: len(first)])
    assert first.shape[1] == 11
    assert (first.diff(dim=1) == 1).all()
    assert first[:, 0].sort().values.diff().eq(10).all()
    assert len(corpus.windows(torch.arange(11), 10, 0, 0)) == 1
    with pytest.raises(ValueError, match="do not fill one window"):
        corpus.windows(torch.arange(10), 10, 0, 0)
    with pytest.raises(ValueError, match="holds no text"):
        corpus.read_texts(tmp_path / "nowhere")
    with pytest.raises(SystemExit, match="holds no text"):
        run(script, tmp_path / "nowhere", tmp_path / "out", heldout=books / "one.txt")
