"""``qoq quantize``: what it makes, tells and refuses."""

from pathlib import Path

import pytest

from helpers.verbs import answer, refusal, run
from qoq.models.load import load_model


def test_quantize_makes_a_checkpoint_with_card_and_report(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    got = answer(
        *("quantize", tiny, "-o", out, "--scheme", "w4a8kv4-g32", "--without", "gptq"),
        *("--calibration", tiny / "calibration.txt", "--samples", 4, "--seq-len", 32),
        *("--eval-windows", 2),
    )
    assert (got["out"], got["scheme"], got["recipe"]) == (
        str(out),
        "w4a8kv4-g32",
        "qoq-without-gptq",
    )
    assert got["bytes"] > 0
    assert 4 < got["bits_per_weight"] < 5.5
    accuracy = got["accuracy"]
    assert (accuracy["windows"], accuracy["seq_len"]) == (2, 32)
    assert accuracy["text"] == "calibration.txt (held back)"
    assert accuracy["kl_mean"] > 0
    assert accuracy["source_perplexity"] > 1
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"{accuracy['perplexity']:.4f}" in card
    assert "format_version" in card
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png") == 4
    assert f"{accuracy['perplexity']:.3f}" in page
    assert load_model(out).scheme.name == "w4a8kv4-g32"


def test_quantize_tells_its_plan_and_result(tiny: Path, tmp_path: Path) -> None:
    result = run(
        *("quantize", tiny, "-o", tmp_path / "out", "--recipe", "rtn"),
        *("--eval-text", tiny / "heldout.txt", "--eval-windows", 1),
    )
    assert "This will take about" in result.stderr
    assert "of memory" in result.stderr
    assert "perplexity" in result.stdout
    assert "heldout" in result.stdout
    assert "report.html" in result.stdout


def test_quantize_without_room_for_the_source_judges_without_it(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qoq.evaluate import memory

    monkeypatch.setattr(memory, "fits_in_memory", lambda folder: False)
    got = answer(
        *("quantize", tiny, "-o", tmp_path / "out", "--recipe", "rtn"),
        *("--eval-text", tiny / "heldout.txt", "--eval-windows", 1),
    )
    assert got["accuracy"]["perplexity"] > 1
    assert got["accuracy"]["source_perplexity"] is None
    assert got["accuracy"]["kl_mean"] is None


def test_recipes_of_quantize(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text('{"name": "mine", "rotate": true}', encoding="utf-8")
    out = tmp_path / "out"
    run("quantize", tiny, "-o", out, "--recipe", file, "--k-rotation", "--no-eval")
    facts = answer("inspect", out)
    assert facts["recipe"]["name"] == "mine"
    assert facts["k_rotation"] == "hadamard"


def test_quantize_refuses(tiny: Path, packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "no folder" in refusal("quantize", tmp_path / "none", "-o", out)
    assert "Unknown scheme" in refusal("quantize", tiny, "-o", out, "--scheme", "w3")
    assert "Unknown recipe" in refusal("quantize", tiny, "-o", out, "--recipe", "best")
    assert "Unknown pass" in refusal("quantize", tiny, "-o", out, "--without", "magic")
    assert "'tpu9'" in refusal("quantize", tiny, "-o", out, "--device", "tpu9")
    assert "no text file" in refusal("quantize", tiny, "-o", out, "--eval-text", tmp_path / "no")
    assert not out.exists()
    again = run("quantize", tiny, "-o", packed, "--recipe", "rtn", status=1)
    assert "exists already" in again.stderr
    assert "--overwrite" in again.stderr
    assert "This will take" not in again.stderr  # nothing was measured for it
    run("quantize", tiny, "-o", packed, "--recipe", "rtn", "--overwrite", "--no-eval")


def test_a_file_in_the_way_is_one_sentence(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    result = run(
        "quantize", tiny, "-o", tmp_path / "file" / "out", "--recipe", "rtn", "--no-eval", status=1
    )
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("qoq: ")
