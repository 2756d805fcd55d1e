"""Peak memory and time of ``qoq quantize`` on random weights of real shapes.

    python benchmarks/quantize_memory.py llama-3.2-1b --samples 8
    python benchmarks/quantize_memory.py llama-3-8b --layers 2 --samples 4

Each run is a process of its own, so its peak resident memory is the command's. Results go to
benchmarks/results/quantize-memory-<shapes>.json and, all of them, into docs/memory.md.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from random_model import write_random_model

from qoq.bench.shapes import SHAPES, config_of
from qoq.evaluate.render import fill

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "memory.md"
EXAMPLE = ROOT / "examples" / "books-llama"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=None, help="only the first few layers")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--folder", type=Path, default=None, help="where the model is written")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        model, out = Path(name) / "model", Path(name) / "out"
        write_random_model(args.shapes, model, EXAMPLE, args.layers)
        command = [sys.executable, "-m", "qoq", "quantize", str(model), "-o", str(out)]
        command += ["--samples", str(args.samples), "--seq-len", str(args.seq_len)]
        command += ["--dtype", args.dtype, "--no-eval"]
        command += ["--calibration", str(EXAMPLE / "calibration.txt")]
        start = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - start
        size = sum(file.stat().st_size for file in out.iterdir())
    layers = config_of(args.shapes, args.layers).num_layers
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    result = {
        "shapes": args.shapes,
        "layers": layers,
        "samples": args.samples,
        "seq_len": args.seq_len,
        "dtype": args.dtype,
        "seconds": round(seconds, 1),
        "peak_rss_gb": round(peak / 1e9, 3),
        "checkpoint_gb": round(size / 1e9, 3),
        "command": f"python benchmarks/quantize_memory.py {args.shapes} --samples {args.samples}"
        + (f" --layers {args.layers}" if args.layers else ""),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
        ).stdout.strip(),
        "cores": os.cpu_count(),
        "cpu": _cpu(),
    }
    path = ROOT / "benchmarks" / "results" / f"quantize-memory-{args.shapes}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), {"memory": table()}), encoding="utf-8")


def table() -> str:
    """Every result there is, as markdown."""
    lines = [
        "| shapes | layers | calibration | peak memory | time | checkpoint | command |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for path in sorted((ROOT / "benchmarks" / "results").glob("quantize-memory-*.json")):
        r = json.loads(path.read_text())
        lines.append(
            f"| {r['shapes']} | {r['layers']} | {r['samples']} x {r['seq_len']} tokens "
            f"| {r['peak_rss_gb']:.2f} GB | {r['seconds'] / 60:.0f} min "
            f"| {r['checkpoint_gb']:.2f} GB | `{r['command']}` (commit {r['commit']}, "
            f"{r['cores']} cores of {r['cpu']}) |"
        )
    return "\n".join(lines)


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")


if __name__ == "__main__":
    main()
