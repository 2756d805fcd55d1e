"""How the program starts, teaches and ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from helpers.verbs import SOURCE, run, spawn
from qoq import __version__

VERBS = (
    ["quantize"],
    ["eval", "ppl"],
    ["eval", "table"],
    ["eval", "render"],
    ["inspect"],
    ["generate"],
    ["chat"],
    ["complete"],
    ["run-batch"],
    ["bench", "serve"],
    ["bench", "latency"],
    ["import-qserve"],
    ["export-qserve"],
    ["check-env"],
)


def test_version_and_help() -> None:
    assert run("--version").stdout == f"qoq {__version__}\n"
    for verb in VERBS:
        text = run(*verb, "--help").stdout
        assert "--json" in text, verb
        if verb != ["check-env"]:
            assert f"qoq {' '.join(verb)}" in text, f"{verb} shows no example"


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
