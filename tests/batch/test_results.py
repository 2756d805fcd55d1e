"""The result file: whatever an interrupt leaves, nothing is lost and nothing is there twice."""

import json
from pathlib import Path
from typing import Any

import pytest

from qoq.batch.results import Results
from qoq.errors import SourceError


def line(name: str, status: int = 200) -> dict[str, Any]:
    return {"id": f"id-{name}", "custom_id": name, "response": {"status_code": status}}


def test_written_resumed_published(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out.jsonl"
    with Results(out) as results:
        results.write(line("a"))
    assert not out.exists()
    with Results(out) as results:
        assert results.resumed == 1
        assert results.has("id-a")
        assert results.has("else", "a")
        assert not results.has("id-b", "b")
        results.write(line("b", 400))
        assert results.failed == 1
        results.publish()
    assert [json.loads(each)["custom_id"] for each in out.read_text().splitlines()] == ["a", "b"]
    assert not results.partial.exists()
    with Results(out) as results:  # more lines of input later: the finished file is taken up
        assert (results.resumed, results.failed) == (2, 1)
        assert out.exists()
    with Results(out, overwrite=True) as results:
        assert results.resumed == 0


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_half_written_line_is_cut_off(tmp_path: Path, cut: int) -> None:
    out = tmp_path / "out.jsonl"
    with Results(out) as results:
        results.write(line("a"))
        results.write(line("b"))
    results.partial.write_bytes(results.partial.read_bytes()[:-cut])
    with Results(out) as results:
        assert results.has("id-a")
        assert not results.has("id-b")
        results.write(line("b"))
        results.publish()
    assert [json.loads(each) for each in out.read_text().splitlines()] == [line("a"), line("b")]


def test_foreign_files_and_second_runs_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text('{"my": "notes"}\nunfinished', encoding="utf-8")
    with pytest.raises(SourceError, match="Line 1"):
        Results(out)
    assert out.read_text(encoding="utf-8") == '{"my": "notes"}\nunfinished'
    other = tmp_path / "other.jsonl"
    with Results(other), pytest.raises(SourceError, match="Another run"):
        Results(other)
    with Results(other):
        pass


def test_a_malformed_line_answers_for_no_custom_id(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with Results(out) as results:
        results.write({"id": "x", "custom_id": "a", "response": None, "error": {}})
    with Results(out) as results:
        assert results.has("x")
        assert not results.has("id-a", "a")
