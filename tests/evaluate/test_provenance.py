"""Every result says where it comes from."""

import re
from pathlib import Path

import psutil
import pytest

from qoq.evaluate import provenance
from qoq.evaluate.memory import fits_in_memory


def test_facts() -> None:
    facts = provenance.provenance(["eval", "table", "my model"])
    assert facts["command"] == "qoq eval table 'my model'"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", facts["date"])
    assert facts["hardware"]["cores"] >= 1
    assert facts["hardware"]["memory_gb"] > 0
    assert facts["code"] is None or re.fullmatch(r"[0-9a-f]{12}", facts["code"])
    assert facts["commit"] is None or re.fullmatch(r"[0-9a-f]{12}(-dirty)?", facts["commit"])


def test_no_git_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert provenance.commit() is None
    assert provenance.code() is None


def test_memory_decides(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fits_in_memory(tiny)
    low = psutil.virtual_memory()._replace(available=1 << 20)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: low)
    assert not fits_in_memory(tiny)
