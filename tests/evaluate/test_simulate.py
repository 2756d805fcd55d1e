"""Simulated schemes go through the one pipeline and leave nothing behind."""

import tempfile
from pathlib import Path

import pytest
import torch

from qoq.errors import QoqError, SchemeError
from qoq.evaluate.simulate import Calibrated, parse_simulation, simulate
from qoq.formats.activation import quantize_per_token
from qoq.models.load import load_model
from qoq.quantize.pipeline import quantize
from qoq.quantize.recipe import PUBLISHED_G128, PUBLISHED_PER_CHANNEL, QOQ, RTN, Recipe


@pytest.mark.parametrize(
    ("name", "scheme", "recipe"),
    [
        ("rtn-w4a8kv4-g128", "w4a8kv4-g128", RTN),
        ("w4a8k8v4", "w4a8k8v4", RTN),
        ("qoq-W4A8KV4", "w4a8kv4", QOQ),
        ("published-w4a8kv4", "w4a8kv4", PUBLISHED_PER_CHANNEL),
        (" published-w4a8kv4-g64", "w4a8kv4-g64", PUBLISHED_G128),
    ],
)
def test_names(name: str, scheme: str, recipe: Recipe) -> None:
    assert parse_simulation(name) == (scheme, recipe)


@pytest.mark.parametrize("name", ["awq-w4a8kv4", "rtn", "qoq-", "rtn-w5a8", ""])
def test_unknown_names_say_what_there_is(name: str) -> None:
    with pytest.raises(SchemeError, match="rtn-, qoq-, published-"):
        parse_simulation(name)


def test_the_result_is_that_of_the_pipeline(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    calibrated = Calibrated(str(tiny / "calibration.txt"), samples=2, seq_len=32, seed=5)
    recipe = Recipe("some", center_keys=True)
    steps: list[str] = []
    model = simulate(
        tiny, "w4a8kv4-g64", recipe, calibrated, steps=lambda _, __, what: steps.append(what)
    )
    assert steps
    assert not list((tmp_path / "temporary").iterdir())
    path = quantize(
        tiny,
        tmp_path / "out",
        scheme="w4a8kv4-g64",
        recipe=recipe,
        calibration=calibrated.source,
        samples=2,
        seq_len=32,
        seed=5,
    )
    other = load_model(path)
    assert model.scheme == other.scheme
    mine, theirs = model.decoder.layers[1], other.decoder.layers[1]
    assert mine.k_center is not None
    assert theirs.k_center is not None
    assert torch.equal(mine.k_center, theirs.k_center)
    x = quantize_per_token(torch.randn(5, mine.config.hidden_size))
    assert torch.equal(mine.qkv(x), theirs.qkv(x))


def test_nothing_is_left_after_an_error(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(QoqError):
        simulate(tiny, "w4a8kv4", Recipe("bad", gptq=True), Calibrated("none.txt"))
    assert not list(tmp_path.iterdir())
