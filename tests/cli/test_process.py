"""How the program starts, teaches and ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from helpers.verbs import SOURCE, run, spawn
from qoq import __version__
from qoq.cli.app import app


def verbs(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every verb of the program."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from verbs(command, (*path, name))
        else:
            yield (*path, name)


def test_version_and_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run("--version").stdout == f"qoq {__version__}\n"
    seen = list(verbs(typer.main.get_command(app)))
    assert {("serve",), ("bench", "engine"), ("eval", "lm")} <= set(seen)
    for verb in seen:
        text = run(*verb, "--help").stdout
        assert verb == ("serve",) or "--json" in text, verb
        times = text.count(f"qoq {' '.join(verb)}")
        assert times > 1 or verb == ("check-env",), f"{verb} shows no example beside its usage"
        assert "\u2026" not in text, f"{verb} has a name that does not fit its table"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, qoq.cli.app; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
    )
    assert process.stdout == "[]\n"


def test_ctrl_c_exits_130_and_says_how_to_go_on(tiny: Path, tmp_path: Path) -> None:
    process = spawn(
        *("quantize", tiny, "-o", tmp_path / "out", "--calibration", tiny / "calibration.txt"),
        *("--samples", 30, "--seq-len", 100, "--no-eval"),
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:  # interrupted in the middle of the work, not while it starts
        lines.append(line)
        if "This will take" in line:
            break
    while not (tmp_path / "out.partial").exists():
        assert process.poll() is None, lines
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130, rest
    assert "interrupted" in rest
    assert "OUT.partial" in rest
    assert "Traceback" not in rest


def test_a_reader_that_leaves_is_no_error(packed: Path) -> None:
    process = spawn("inspect", packed)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(60) in (0, 1)


def test_usage_errors_exit_2() -> None:
    assert "No such command" in run("paint", status=2).stderr
    assert "--out" in run("quantize", "model", status=2).stderr
