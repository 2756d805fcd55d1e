"""The check: parts in processes of their own, results that survive whatever becomes of them."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qoq.bench.gpu import check
from qoq.bench.gpu.parts import PARTS, Part
from qoq.cli.app import app
from qoq.errors import RequestError

WORKER = """
import faulthandler, json, os, signal, sys, time
faulthandler.register(signal.SIGUSR1)
name, *rest = sys.argv[1:]
log = open(os.environ["WORKER_LOG"], "a")
print(name, *rest[:1] if rest[0] == "--warm" else [rest[1]], file=log, flush=True)
if rest[0] == "--warm":
    sys.exit()
with open(rest[0], "w") as out:
    print(json.dumps({"row": 1}), file=out, flush=True)
    if name == "crash":
        print("it broke", file=sys.stderr)
        sys.exit(3)
    if name.startswith("hang"):
        out.write('{"row": 2')
        out.flush()
        time.sleep(300)
    print(json.dumps({"row": 2}), file=out)
"""


def part(name: str, seconds: float = 20, **more: Any) -> Part:
    return Part(name, seconds, lambda bench: iter(()), lambda rows: [f"{len(rows)} rows"], **more)


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    monkeypatch.setenv("WORKER_LOG", str(tmp_path / "log"))
    return [sys.executable, str(script)]


def test_parts_end_as_they_end(
    worker: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {"failed": lambda rows: True}
    parts = [part("fine"), part("crash"), part("hang", 1), part("wrong", **wrong)]
    monkeypatch.setattr(check, "PARTS", {p.name: p for p in parts})
    results: dict[str, Any] = {}
    saved: list[list[str]] = []
    told: list[str] = []
    check.run(
        parts, results, lambda: saved.append(list(results)), told.append, seconds=90, worker=worker
    )
    assert {name: result["status"] for name, result in results.items()} == {
        "fine": "done",
        "crash": "failed",
        "hang": "stopped",
        "wrong": "done",
    }
    assert results["fine"]["rows"] == [{"row": 1}, {"row": 2}]
    assert results["crash"]["rows"] == results["hang"]["rows"] == [{"row": 1}]
    assert "it broke" in results["crash"]["error"]
    assert "worker.py" in results["hang"]["error"]  # where it was
    assert "error" not in results["fine"]
    names = [p.name for p in parts]
    assert saved == [names[: i + 1] for i in range(4)]
    assert len(told) == 4
    assert check.failures(results) == ["crash", "wrong"]
    table = "\n".join(check.lines(results))
    assert "== hang" in table
    assert "STOPPED" in table
    assert "it broke" in table
    json.dumps(results)


def test_time_for_all_bounds_each(worker: list[str]) -> None:
    parts = [part("hang", 10), part("fine", 60), part("hang too", 20)]
    results: dict[str, Any] = {}
    told: list[str] = []
    start = time.monotonic()
    check.run(parts, results, lambda: None, told.append, seconds=18, worker=worker)
    assert time.monotonic() - start < 25
    assert [result["status"] for result in results.values()] == ["stopped", "done", "stopped"]
    # A ninth of the time; then what the quick one has left over goes to the last.
    assert told[0] == "hang (2 s at most)"
    assert results["hang"]["seconds"] < 5 < results["hang too"]["seconds"]


def test_kernels_are_compiled_ahead_and_ceilings_handed_on(
    worker: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "MOST_WARMERS", 2)
    monkeypatch.setattr(check.os, "cpu_count", lambda: 8)
    rows = [
        {"system": "read", "bytes_per_s": 5.0},
        {"system": "torch int8", "ops_per_s": 7.0},
        {"system": "torch bf16", "ops_per_s": 3.0},
    ]
    results: dict[str, Any] = {"ceilings": {"status": "done", "seconds": 1, "rows": rows}}
    warm = part("fine", warm=lambda *_: None, warm_seconds=20)
    check.run([warm], results, lambda: None, lambda _: None, seconds=60, worker=worker)
    log = (tmp_path / "log").read_text().splitlines()
    assert sorted(log[:2]) == ["fine --warm"] * 2
    assert log[2] == 'fine {"read": 5.0, "int8": 7.0, "bf16": 3.0}'


def test_choosing() -> None:
    def names(only: str | None, have: dict[str, Any]) -> list[str]:
        return [p.name for p in check.chosen(only, have)]

    assert names(None, {}) == list(PARTS)
    assert names("env, subnormal", {}) == ["env", "subnormal"]
    assert names("attention,gemm", {}) == ["ceilings", "gemm", "attention"]
    assert names("gemm", {"ceilings": {}}) == ["gemm"]
    with pytest.raises(RequestError, match=r"no part 'speed'.*env, ceilings"):
        names("speed", {})


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    told = CliRunner().invoke(app, ["gpu-check", "--out", str(tmp_path / "out.json")])
    assert told.exit_code == 1
    assert told.stderr == (
        "qoq: There is nothing to check: torch sees no CUDA GPU on this machine.\n"
    )
    assert not list(tmp_path.iterdir())


def test_the_file_grows_part_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.json"
    seen: list[list[str]] = []

    def run(parts: Any, results: Any, save: Any, tell: Any, *, seconds: float) -> None:
        assert seconds == 120
        for one in parts:
            results[one.name] = {"status": "done", "seconds": 1.0, "rows": []}
            save()
            seen.append(list(json.loads(out.read_text())["parts"]))

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(check, "run", run)
    command = ["gpu-check", "--minutes", "2", "--out", str(out)]
    told = CliRunner().invoke(app, [*command, "--only", "env,subnormal"])
    assert told.exit_code == 0, told.output
    assert seen == [["env"], ["env", "subnormal"]]
    assert f"all of it is in {out}" in told.stdout
    told = CliRunner().invoke(app, [*command, "--only", "bits", "--resume", "--json"])
    assert list(json.loads(told.stdout)["parts"]) == ["env", "subnormal", "bits"]
    out.write_text("[]")
    told = CliRunner().invoke(app, [*command, "--resume"])
    assert told.exit_code == 1
    assert "no file of results" in told.stderr
