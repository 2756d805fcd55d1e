"""Running verbs of the command line, in this process or in one of their own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from qoq.cli.app import app

FAULTY = Path(__file__).with_name("faulty_server.py")
SOURCE = Path(__file__).parents[2] / "src"


def run(*arguments: object, status: int = 0, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)
    assert result.exit_code == status, (result.output, result.exception)
    return result


def answer(*arguments: object) -> dict[str, Any]:
    """What --json prints: one object on stdout, nothing on stderr."""
    result = run(*arguments, "--json")
    value = json.loads(result.stdout)
    assert isinstance(value, dict)
    assert result.stderr == ""
    return value


def refusal(*arguments: object, status: int = 1) -> str:
    """The one sentence on stderr of a verb that fails."""
    result = run(*arguments, status=status)
    assert result.stdout == ""
    assert result.stderr.startswith("qoq: ")
    assert "Traceback" not in result.stderr
    return result.stderr


def hear_ctrl_c() -> None:
    """For Popen's ``preexec_fn``: tests in the background of a shell ignore SIGINT, and a child
    would inherit that.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def spawn(
    *arguments: object, fault: tuple[str, int] | None = None, **more: Any
) -> "subprocess.Popen[str]":
    """A verb in a process of its own; ``fault``: with an engine that fails (``faulty_server``)."""
    how = ["-m", "qoq"] if fault is None else [str(FAULTY), *map(str, fault)]
    return subprocess.Popen(
        [sys.executable, *how, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        preexec_fn=hear_ctrl_c,
        **more,
    )
