"""The check: parts one after the other, each in processes of its own, within a time for all.

What a part has shown is in the file of results when it ends, however it ends.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import qoq
from qoq.bench.gpu.bench import Row
from qoq.bench.gpu.ceilings import measured
from qoq.bench.gpu.parts import NEED_CEILINGS, PARTS, Part
from qoq.errors import RequestError

MOST_WARMERS = 8

Result = dict[str, Any]
"""Of one part: status (done, stopped, failed), seconds, rows, and what it printed: ``told``, or
``error`` where it was not done.
"""
Tell = Callable[[str], None]


def chosen(only: str | None, have: dict[str, Result]) -> list[Part]:
    """The parts named in ``only`` (with commas; None: all), in their order.

    Those that count floors bring ``ceilings`` along, unless ``have`` holds its results. Raises
    RequestError for a name that is no part's.
    """
    names = list(PARTS) if only is None else [name.strip() for name in only.split(",")]
    strange = [name for name in names if name not in PARTS]
    if strange:
        raise RequestError(f"There is no part {strange[0]!r}; there are {', '.join(PARTS)}.")
    if any(name in NEED_CEILINGS for name in names) and "ceilings" not in have:
        names.append("ceilings")
    return [part for name, part in PARTS.items() if name in names]


def run(
    parts: Sequence[Part],
    results: dict[str, Result],
    save: Callable[[], None],
    tell: Tell,
    *,
    seconds: float,
    worker: Sequence[str] = (sys.executable, "-m", "qoq.bench.gpu.worker"),
) -> None:
    """Run the parts and put what they show into ``results``, by name; ``save`` after each.

    ``seconds`` bounds all of them; what is left of them is shared by what parts usually need.
    """
    end = time.monotonic() + seconds
    for number, part in enumerate(parts):
        start = time.monotonic()
        usual = sum(other.seconds + other.warm_seconds for other in parts[number:])
        stretch = (end - start) / usual
        tell(f"{part.name} ({stretch * (part.seconds + part.warm_seconds):.0f} s at most)")
        if part.warm is not None:
            _warm(part, worker, stretch * part.warm_seconds)
        own = start + stretch * (part.seconds + part.warm_seconds) - time.monotonic()
        known = measured(results.get("ceilings", {}).get("rows", []))
        ceilings = json.dumps(None if known is None else asdict(known))
        result = _run(part, worker, ceilings, own)
        results[part.name] = {**result, "seconds": round(time.monotonic() - start, 1)}
        save()


def failures(results: dict[str, Result]) -> list[str]:
    """Names of the parts that broke, or whose rows show an error."""
    return [
        name
        for name, result in results.items()
        if result["status"] == "failed" or (result["rows"] and PARTS[name].failed(result["rows"]))
    ]


def lines(results: dict[str, Result]) -> list[str]:
    """The tables of all parts."""
    out = []
    for name, result in results.items():
        ended = "" if result["status"] == "done" else f", {result['status'].upper()}"
        out.append(f"== {name} ({result['seconds']:.0f} s{ended})")
        if result["rows"]:
            out += PARTS[name].lines(result["rows"])
        out += [f"  {line}" for line in result.get("error", "").splitlines()[-8:]]
    return out


def _warm(part: Part, worker: Sequence[str], seconds: float) -> None:
    """Compile a part's kernels in several processes; what fails will show when it is measured."""
    count = max(1, min(MOST_WARMERS, (os.cpu_count() or 2) // 2))
    nothing = subprocess.DEVNULL
    started = [
        _start([*worker, part.name, "--warm", str(share), str(count)], nothing, OMP_NUM_THREADS="1")
        for share in range(count)
    ]
    end = time.monotonic() + seconds
    for process in started:
        _finish(process, end - time.monotonic())


def _run(part: Part, worker: Sequence[str], ceilings: str, seconds: float) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        file, told = Path(folder, "rows.jsonl"), Path(folder, "told.txt")
        with told.open("wb") as output:
            command = [*worker, part.name, str(file), ceilings, str(seconds)]
            code = _finish(_start(command, output), seconds, ask=True)
        status = "stopped" if code is None else "failed" if code else "done"
        text = told.read_text(encoding="utf-8", errors="replace")[-4000:]
        name = "told" if status == "done" else "error"
        return {"status": status, "rows": _read(file), **({name: text} if text else {})}


def _start(command: Sequence[str], output: Any, **more: str) -> "subprocess.Popen[bytes]":
    source = str(Path(qoq.__file__).parents[1])
    path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    environment = {**more, **os.environ, "PYTHONPATH": path}
    return subprocess.Popen(
        command, env=environment, stdout=output, stderr=output, start_new_session=True
    )


def _finish(process: "subprocess.Popen[bytes]", seconds: float, *, ask: bool = False) -> int | None:
    """Its exit status; None where it had to be stopped, with all that it has started.

    ``ask``: it is to tell what it was doing.
    """
    try:
        return process.wait(max(0.1, seconds))
    except subprocess.TimeoutExpired:
        if ask:
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.5)
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _read(file: Path) -> list[Row]:
    """The rows of whole lines: the last may have been cut off."""
    if not file.is_file():
        return []
    whole = file.read_text(encoding="utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]
