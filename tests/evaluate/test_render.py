"""Saved results as markdown, and documents filled between markers."""

import pytest

from qoq.errors import TextError
from qoq.evaluate.render import fill, markdown, sections

RESULT = {"perplexity": 47.12345, "kl_mean": 0.0123, "kl_p99": 0.08, "top1_agreement": 0.9}
EMPTY = {"perplexity": None, "kl_mean": None, "kl_p99": None, "top1_agreement": None}
ROWS = [
    {"label": "full", "step": False, "results": {"a": RESULT, "b": EMPTY}},
    {"label": "+ pass", "step": True, "results": {"a": EMPTY, "b": RESULT}},
]
MEASURED = {
    "command": "qoq eval table m",
    "commit": "abc",
    "date": "2030-01-02",
    "hardware": {"cores": 2, "cpu": "Some CPU", "torch": "9.9"},
    "calibration": {"samples": 3, "seq_len": 4, "source": "c.txt", "seed": 0},
    "texts": [{"name": "a", "windows": 5, "seq_len": 6}],
    "tables": {"accuracy": ROWS, "parts": ROWS[:1]},
}


def test_a_table_has_every_text_beside_the_others() -> None:
    lines = markdown(ROWS).splitlines()
    assert lines[0].startswith("|  | a: ppl | a: KL mean x1e-3 | a: KL 99 % | a: top-1 | b: ppl |")
    assert lines[2] == "| full | 47.123 | 12.300 | 0.0800 | 90.00% | inf | - | - | - |"
    assert len({line.count("|") for line in lines}) == 1
    assert markdown([]) == ""


def test_sections() -> None:
    parts = sections(MEASURED)
    assert set(parts) == {"accuracy", "parts", "summary", "provenance"}
    assert "+ pass" in parts["accuracy"]
    assert "+ pass" not in parts["summary"]
    assert "a: 5 windows of 6 tokens" in parts["provenance"]
    assert "Commit abc, 2030-01-02, on 2 cores of Some CPU, torch 9.9" in parts["provenance"]


def test_only_marked_places_change() -> None:
    document = "x\n<!-- a:begin -->\nold \\1\n<!-- a:end -->\ny\n<!-- b:begin -->\n<!-- b:end -->z"
    once = fill(document, {"a": "new \\g<0>", "c": "unused"})
    assert once == document.replace("old \\1", "new \\g<0>")
    assert fill(once, {"a": "new \\g<0>"}) == once


def test_every_place_of_a_name_is_filled() -> None:
    place = "<!-- a:begin --><!-- a:end -->"
    assert fill(place + " between " + place, {"a": "T"}).count("\nT\n") == 2


def test_documents_without_places_are_refused() -> None:
    with pytest.raises(TextError, match="marks no place"):
        fill("nothing", {"a": "t"})
    with pytest.raises(TextError, match="no <!-- a:end -->"):
        fill("<!-- a:begin --> text", {"a": "t"})
