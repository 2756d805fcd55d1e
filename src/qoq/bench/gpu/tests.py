"""tests: those of the Triton twins, on this GPU: random inputs, odd sizes, poisoned memory."""

import json
import os
import subprocess
import sys
import tempfile
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
        file, told = Path(folder, "rows.jsonl"), Path(folder, "told.txt")
        file.touch()
        # Options of the project's own that need plugins which may be missing are left out.
        command = [
            *(sys.executable, "-m", "pytest", tests, "-q", "-o", "addopts="),
            *("--import-mode=importlib", "-m", "not gpu_code"),
            *("-p", "qoq.bench.gpu.pytest_rows", f"--rows={file}"),
            *("-o", f"cache_dir={folder}/cache", *_processes()),
        ]
        # Machine code for other GPUs than this one is looked at where there is none. The processes
        # share the cores: threads of oracles would keep each other from them.
        one = {"OMP_NUM_THREADS": "1"}
        environment = {**one, **os.environ, "QOQ_NO_MACHINE_CODE": "1"}
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
        whole = file.read_text(encoding="utf-8").rpartition("\n")[0]
        reports = [json.loads(line) for line in whole.splitlines()]
        if not reports:
            yield {"problem": "pytest ran no test", "told": _tail(told)}
            return
        yield from (report for report in reports if report["outcome"] == "failed")
        outcomes = [report["outcome"] for report in reports]
        yield {outcome: outcomes.count(outcome) for outcome in ("passed", "failed", "skipped")}


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
            name = row["test"].rpartition("/")[2]
            out.append(f"  FAILED {name}: {(row['message'].splitlines() or [''])[0][:100]}")
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
