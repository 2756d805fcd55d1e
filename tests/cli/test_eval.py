"""``qoq eval``: figures, tables, documents."""

import json
from pathlib import Path

from helpers.verbs import answer, refusal, run
from qoq.evaluate.perplexity import evaluate
from qoq.evaluate.texts import read_text
from qoq.evaluate.texts import windows as cut
from qoq.models.load import load_model
from qoq.tokenizer import Tokenizer


def test_ppl_of_a_source_equals_evaluate(tiny: Path) -> None:
    got = answer("eval", "ppl", tiny, "--seq-len", 40, "--windows", 3)
    windows = cut(read_text(tiny / "heldout.txt"), Tokenizer.load(tiny), 40, 3)
    assert got == {
        "model": str(tiny),
        "scheme": "w16a16",
        "text": "heldout",
        "seq_len": 40,
        "windows": 3,
        **evaluate(load_model(tiny), windows).to_dict(),
    }


def test_ppl_with_a_reference_and_simulated(tiny: Path, packed: Path) -> None:
    heldout = ["--text", tiny / "heldout.txt", "--windows", 2]
    real = answer("eval", "ppl", packed, "--reference", tiny, *heldout)
    assert real["scheme"] == "w4a8kv4-g128"
    assert real["seq_len"] == 128  # the model's whole context
    assert real["kl_mean"] > 0
    simulated = answer("eval", "ppl", tiny, "--scheme", "rtn-w4a8kv4-g128", *heldout)
    for name in ("perplexity", "kl_mean", "kl_p99", "top1_agreement"):
        assert simulated[name] == real[name]
    shown = run("eval", "ppl", packed, "--reference", tiny, *heldout)
    assert f"{real['perplexity']:.4f}" in shown.stdout
    assert "top-1" in shown.stdout


def test_ppl_refuses(tiny: Path, packed: Path) -> None:
    both = ["--text", tiny / "heldout.txt", "--dataset", "heldout"]
    assert "not both" in refusal("eval", "ppl", tiny, *both)
    assert "lower --seq-len" in refusal("eval", "ppl", tiny, "--seq-len", 129)
    assert "rtn-" in refusal("eval", "ppl", tiny, "--scheme", "awq-w4")
    assert "--windows" in refusal("eval", "ppl", "no-model", "--windows", 0)
    assert "heldout.txt beside" in refusal("eval", "ppl", packed, "--dataset", "heldout")


def test_table_saves_resumes_and_renders(tiny: Path, packed: Path, tmp_path: Path) -> None:
    file, document = tmp_path / "new" / "rows.json", tmp_path / "doc.md"
    options = [
        *("eval", "table", tiny, "--rows", "quick", "--checkpoint", packed, "--windows", 1),
        *("--calibration", tiny / "calibration.txt", "--samples", 2),
        *("--calibration-seq-len", 32, "--seq-len", 48, "--save", file),
    ]
    got = answer(*options)
    assert got == json.loads(file.read_text(encoding="utf-8"))
    labels = [row["label"] for row in got["tables"]["accuracy"]]
    assert labels[0] == "full precision"
    assert labels[-1] == f"checkpoint {packed.name}"
    assert got["texts"] == [{"name": "heldout", "seq_len": 48, "windows": 1}]
    assert got["calibration"]["samples"] == 2
    by_label = {row["label"]: row["results"]["heldout"] for row in got["tables"]["accuracy"]}
    assert by_label["RTN, g128"] == by_label[labels[-1]]
    shown = run(*options, "--resume")
    assert "measured anew" not in shown.stderr
    assert "accuracy: heldout, 1 windows of 48 tokens" in shown.stdout
    assert json.loads(file.read_text(encoding="utf-8"))["tables"] == got["tables"]
    assert "other settings" in refusal(*options, "--resume", "--seed", 7)
    file.write_text(json.dumps({**got, "code": "older"}), encoding="utf-8")
    assert "measured anew" in run(*options, "--resume").stderr
    document.write_text("<!-- summary:begin -->\n<!-- summary:end -->\n", encoding="utf-8")
    filled = answer("eval", "render", file, "--into", document)
    assert filled["filled"] == [str(document)]
    assert filled["sections"]["summary"] in document.read_text(encoding="utf-8")
    assert "### provenance" in run("eval", "render", file).stdout


def test_table_and_render_refuse(tiny: Path, tmp_path: Path) -> None:
    assert "no set of rows" in refusal("eval", "table", tiny, "--rows", "some")
    assert "--save" in refusal("eval", "table", tiny, "--resume")
    assert "no file" in refusal("eval", "render", tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("[]", encoding="utf-8")
    assert "no saved result" in refusal("eval", "render", tmp_path / "bad.json")
