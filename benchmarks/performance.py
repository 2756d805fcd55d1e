"""docs/performance.md from what `qoq bench` measured: one JSON file per run.

qoq bench kernels --shape llama-3.2-1b --json > benchmarks/results/kernels-NAME.json
qoq bench throughput --shape llama-3.2-1b --json > benchmarks/results/throughput-NAME.json
qoq bench throughput ... --ablate linear --json > benchmarks/results/throughput-NAME-ablate.json
python benchmarks/peers/compare.py --home PEERS    (benchmarks/peers/README.md)
qoq bench crossover --json > benchmarks/results/crossover-NAME.json
python benchmarks/performance.py
"""

import json
from pathlib import Path
from typing import Any

import performance_attention
import performance_crossover

from qoq.evaluate.render import fill, grid

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
PICTURE = ROOT / "docs" / "images" / "kv-decode.svg"
SPEEDS = {"prefill": "prefill_tok_s", "decode": "decode_tok_s", "total": "total_tok_s"}


def read(kind: str) -> list[dict[str, Any]]:
    """All runs of a kind, in order of their files' names."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{kind}-*.json"))]


def kernels(op: str) -> str:
    """A table per run: a line per shape, a column per M, time and share of the roof."""
    parts = []
    for run in read("kernels"):
        rows = [row for row in run["rows"] if row["op"] == op]
        sizes = sorted({row["M"] for row in rows})
        shapes = dict.fromkeys(row["shape"] for row in rows)
        at = {(row["shape"], row["M"]): row for row in rows}
        lines = [
            [shape, *(_cell(at[shape, m]) for m in sizes if (shape, m) in at)] for shape in shapes
        ]
        title = (
            f"{run['shape']}, {run['scheme']}, {run['isa']}, {run['threads']} threads; int8 "
            f"{run['int8_peak_ops'] / 1e12:.2f} TOPS, reads {run['read_bandwidth'] / 1e9:.1f} GB/s"
        )
        head = "M" if op != "attention" else "batch"
        parts.append(f"{title}\n\n" + grid(["", *(f"{head} {m}" for m in sizes)], lines))
    return "\n\n".join(parts)


def _cell(row: dict[str, Any]) -> str:
    return f"{row['seconds'] * 1e3:.3f} ms, {row['fraction']:.0%}"


def throughput() -> str:
    """A line per batch of every run."""
    lines = [
        [
            run["shape"],
            run["scheme"],
            run["isa"],
            f"{result['prompt_len']} / {result['output_len']}",
            str(result["batch"]),
            *(
                f"{result[key]:.1f}"
                for key in ("prefill_tok_s", "decode_tok_s", "output_tok_s", "total_tok_s")
            ),
        ]
        for run in read("throughput")
        if not run.get("ablate")  # those have a table of their own
        for result in run["runs"]
    ]
    heads = ["shape", "scheme", "isa", "in / out", "batch", "prefill", "decode", "output", "total"]
    return grid(heads, lines)


def peers() -> str:
    """A table per comparison: every system at every batch, and how many times its speed ours is."""
    parts = []
    for run in read("peers"):
        own = {row["batch"]: row for row in run["medians"] if row["name"] == "qoq"}
        lines, behind = [], []
        for row in run["medians"]:
            ours = own[row["batch"]]
            ratios = {name: ours[key] / row[key] for name, key in SPEEDS.items()}
            is_own = row is ours
            behind += [
                f"{name} at batch {row['batch']} against {row['title']} ({ratio:.2f}x)"
                for name, ratio in ratios.items()
                if ratio < 1
            ]
            lines.append(
                [
                    f"**{run['scheme']}, ours**" if is_own else row["title"],
                    str(row["batch"]),
                    *(f"{row[key]:.1f}" for key in SPEEDS.values()),
                    *("" if is_own else f"{ratio:.2f}x" for ratio in ratios.values()),
                ]
            )
        rounds = min(row["rounds"] for row in run["medians"])
        title = (
            f"{run['shape']}, {run['prompt_len']} in / {run['output_len']} out, {run['isa']}, "
            f"{run['threads']} threads; medians of {rounds} round(s) or more"
        )
        heads = ["", "batch", *SPEEDS, *(f"ours / theirs: {name}" for name in SPEEDS)]
        end = f"Where we lose: {'; '.join(behind)}." if behind else "We lose nowhere here."
        parts.append(f"{title}\n\n{grid(heads, lines)}\n\n{end}")
    return "\n\n".join(parts) or "Not measured yet."


def origins() -> str:
    """The commands, commits and machines of all runs."""
    lines = []
    for run in read("kernels") + read("crossover") + read("peers") + read("throughput"):
        machine = run["hardware"]
        lines.append(
            f"- `{run['command']}`: commit {run['commit']}, {run['date']}, {machine['cores']} "
            f"cores of {machine['cpu']}, {run['isa']}, {run['threads']} threads{_versions(run)}"
        )
    return "\n".join(lines)


def _versions(run: dict[str, Any]) -> str:
    named = [f"{name} {version}" for name, version in run.get("versions", {}).items()]
    return f"; {', '.join(named)}" if named else ""


def main() -> None:
    parts = {
        "linear": kernels("linear"),
        "attention": kernels("attention"),
        "kv": performance_attention.compared(read("kernels")),
        "prefill": performance_attention.prefill(read("kernels")),
        "halves": performance_attention.halves(read("throughput")),
        "rms_norm_quant": kernels("rms_norm_quant"),
        "silu_mul_quant": kernels("silu_mul_quant"),
        "crossover": performance_crossover.table(read("crossover")),
        "throughput": throughput(),
        "peers": peers(),
        "origins": origins(),
    }
    performance_attention.picture(read("kernels"), PICTURE)
    performance_crossover.pictures(read("crossover"), PICTURE.parent)
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), parts), encoding="utf-8")


if __name__ == "__main__":
    main()
