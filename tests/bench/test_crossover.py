"""The crossover bench: every system at every M, and a picture of them."""

from pathlib import Path

import pytest

from helpers.verbs import answer, refusal
from qoq.bench import crossover as bench
from qoq.bench.crossover import BASELINE, crossover, picture
from qoq.bench.shapes import config_of
from qoq.errors import RequestError
from qoq.kernels.cpu import backend

MISSING = backend.missing()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "COLD_BYTES", 1)
    monkeypatch.setattr(bench, "ROUNDS", 1)
    monkeypatch.setattr(bench, "ROUND_SECONDS", 0)


def test_every_system_is_timed_at_every_m_and_drawn(tmp_path: Path) -> None:
    points = list(crossover(config_of("qwen2.5-0.5b", 1), "o_proj", [1, 5]))
    systems = {point.system for point in points}
    assert BASELINE in systems
    assert len(systems) == 4
    assert sorted((p.system, p.M) for p in points) == sorted(
        (s, m) for s in systems for m in (1, 5)
    )
    assert all(point.seconds > 0 for point in points)
    picture(points, "a title", tmp_path / "x.svg")
    drawn = (tmp_path / "x.svg").read_text()
    assert drawn.startswith("<?xml")
    assert all(f"<!-- {system} -->" in drawn for system in systems)


def test_an_unknown_linear_is_refused() -> None:
    with pytest.raises(RequestError, match="qkv_proj"):
        list(crossover(config_of("qwen2.5-0.5b", 1), "nose_proj", [1]))


def test_the_verb_prints_points_and_draws(tmp_path: Path) -> None:
    file = tmp_path / "c.svg"
    what = ["bench", "crossover", "--shape", "qwen2.5-0.5b", "--linear", "o_proj", "--rows", "1,3"]
    facts = answer(*what, "--picture", str(file))
    assert {point["M"] for point in facts["points"]} == {1, 3}
    assert {"shape", "linear", "isa", "threads", "command", "commit", "hardware"} <= facts.keys()
    assert file.exists()
    assert "rows" in refusal("bench", "crossover", "--rows", "x")
