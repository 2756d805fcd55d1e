"""tests: those of the Triton twins, on this GPU: random inputs, odd sizes, poisoned memory."""

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import qoq
from qoq.bench.gpu.bench import Row

REPOSITORY = Path(qoq.__file__).parents[2]
TESTS = "tests/kernels/gpu"
MOST_PROCESSES = 8


def rows(repository: Path = REPOSITORY, tests: str = TESTS, *, seconds: float) -> Iterator[Row]:
    """Every test that did not pass, then how many did."""
    if not (repository / tests).is_dir():
        yield {"problem": f"there is no folder {tests}; run this from a checkout of the sources"}
        return
    with tempfile.TemporaryDirectory() as folder:
        report, told = Path(folder, "report.xml"), Path(folder, "told.txt")
        # Options of the project's own that need plugins which may be missing are left out.
        command = [
            *(sys.executable, "-m", "pytest", tests, "-q", "-o", "addopts="),
            *("--import-mode=importlib", "-m", "not gpu_code", f"--junitxml={report}"),
            *("-o", f"cache_dir={folder}/cache", *_processes()),
        ]
        # Machine code for other GPUs than this one is looked at where there is none.
        environment = {**os.environ, "QOQ_NO_MACHINE_CODE": "1"}
        with told.open("wb") as output:
            try:
                subprocess.run(
                    command,
                    cwd=repository,
                    env=environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=seconds,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                yield {"problem": f"stopped after {seconds:.0f} s", "told": _tail(told)}
        if not report.is_file():
            yield {"problem": "pytest wrote no report", "told": _tail(told)}
            return
        yield from read_report(report)


def read_report(report: Path) -> Iterator[Row]:
    """The rows of a JUnit report."""
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        trouble = next((child for child in case if child.tag in ("failure", "error")), None)
        if trouble is not None:
            counts["failed"] += 1
            yield {"test": name, "message": (trouble.get("message") or "")[:500]}
        else:
            counts["skipped" if case.find("skipped") is not None else "passed"] += 1
    yield counts


def failed(rows: Sequence[Row]) -> bool:
    """Whether any test failed, or they could not be run to their end."""
    counts = [row for row in rows if "passed" in row]
    return any("problem" in row or "test" in row for row in rows) or not counts


def lines(rows: Sequence[Row]) -> list[str]:
    """The counts, and what failed."""
    out: list[str] = []
    for row in rows:
        if "passed" in row:
            counts = ", ".join(f"{count} {what}" for what, count in row.items())
            out.insert(0, f"tests of the kernels: {counts}")
        elif "test" in row:
            out.append(f"  FAILED {row['test']}: {row['message'].splitlines()[0][:100]}")
        else:
            out.append(f"  {row['problem']}")
            out += [f"    {line}" for line in row.get("told", "").splitlines()[-5:]]
    return out


def _processes() -> list[str]:
    if find_spec("xdist") is None:
        return []
    return ["-n", str(max(1, min(MOST_PROCESSES, (os.cpu_count() or 2) // 2)))]


def _tail(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")[-3000:]
