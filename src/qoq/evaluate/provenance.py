"""Where a figure comes from: command, commit, date, hardware; kept beside every result."""

import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from qoq import __version__


def provenance(arguments: Sequence[str]) -> dict[str, Any]:
    """JSON-ready facts about this run; ``arguments`` are those of the ``qoq`` command."""
    return {
        "command": shlex.join(["qoq", *arguments]),
        "commit": commit(),
        "code": code(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "qoq_version": __version__,
        "hardware": hardware(),
    }


def hardware() -> dict[str, Any]:
    """CPU, cores, memory, and the torch that runs on them."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def commit() -> str | None:
    """The commit this package runs from ("-dirty" with changed sources); None if it has no git."""
    here = Path(__file__).parent
    sha = _git(here, "rev-parse", "--short=12", "HEAD")
    if not sha:
        return None
    return f"{sha}-dirty" if _git(here, "status", "--porcelain", "--", "..") else sha


def code() -> str | None:
    """Names the package's committed sources, whatever else a commit changes; None if they are not
    known to be those (no git, or changed since).
    """
    here = Path(__file__).parent
    changed = _git(here, "status", "--porcelain", "--", "..")
    return None if changed else _git(here, "rev-parse", "--short=12", "HEAD:../") or None


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
