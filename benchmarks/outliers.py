"""Which pass rescues which outlier: the bundled model's outlier twins, quantized and judged.

    PYTHONPATH=tests python benchmarks/outliers.py             # measure, then fill docs/outliers.md
    PYTHONPATH=tests python benchmarks/outliers.py --render    # only fill the page again

Results go to benchmarks/results/outliers.json after every case; ``--continue`` keeps those that
are there. About 70 quantizations of the bundled model, an hour or two on two cores.
"""

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from helpers.outliers import KINDS, Outliers, write_qwen2, write_twin
from qoq.evaluate.perplexity import Reference, evaluate
from qoq.evaluate.provenance import provenance
from qoq.evaluate.render import fill
from qoq.evaluate.simulate import Calibrated, simulate
from qoq.evaluate.texts import read_text, windows
from qoq.models.load import load_model
from qoq.quantize.recipe import QOQ, RTN, Recipe
from qoq.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "examples" / "books-llama"
RESULTS = ROOT / "benchmarks" / "results" / "outliers.json"
PAGE = ROOT / "docs" / "outliers.md"
SCHEME = "w4a8kv4-g128"
CALIBRATED = Calibrated(str(MODEL / "calibration.txt"), samples=32, seq_len=1024)
WINDOWS, SEQ_LEN = 4, 2048
PASSES = ("rotate", "center-keys", "smooth-attention", "smooth-outputs")
BASES = ("original", "original, theta 1e6")


@dataclass(frozen=True)
class Twin:
    """A model to make and quantize; ``base`` names the one it is compared with."""

    name: str
    outliers: Outliers | None = None
    bias: dict[str, Any] | None = None  # arguments of write_qwen2; None: stay a Llama
    base: str = BASES[0]
    table: str = "kinds"

    def write(self, folder: Path) -> Path:
        if self.bias is not None:
            return write_qwen2(MODEL, folder, outliers=self.outliers, **self.bias)
        return MODEL if self.outliers is None else write_twin(MODEL, folder, self.outliers)

    def recipes(self) -> dict[str, Recipe]:
        if self.table == "unseen":
            return {"RTN": RTN, "QoQ": QOQ}
        return {"RTN": RTN, "QoQ": QOQ, **{f"without {p}": QOQ.without(p) for p in PASSES}}


def twins() -> Iterator[Twin]:
    yield Twin(BASES[0])
    for kind in KINDS:
        yield Twin(kind, Outliers(kinds=(kind,)))
    yield Twin("all four", Outliers())
    yield Twin(BASES[1], bias={"size": 0.0})
    yield Twin("key bias, layer 0", bias={}, base=BASES[1])
    yield Twin("key bias, all layers", bias={"layers": 6}, base=BASES[1])
    changes: tuple[dict[str, Any], ...] = (
        {"seed": 1},
        {"seed": 2, "strength": 0.3},
        {"seed": 3, "strength": 3.0},
        {"seed": 4, "channels": 1},
        {"seed": 5, "channels": 12},
    )
    for change in changes:
        outliers = replace(Outliers(), **change)
        yield Twin(_settings(outliers), outliers, table="unseen")
    for seed in (1, 2):
        name = f"key bias, layer 0, seed {seed}"
        yield Twin(name, bias={"seed": seed}, base=BASES[1], table="unseen")
    both = Outliers(seed=6)
    bias = {"seed": 6, "layers": 6}
    name = f"key bias, all layers, and {_settings(both)}"
    yield Twin(name, both, bias, base=BASES[1], table="unseen")


def _settings(outliers: Outliers) -> str:
    return f"strength {outliers.strength:g}, {outliers.channels} channels, seed {outliers.seed}"


def measure(known: dict[str, Any]) -> dict[str, Any]:
    tokenizer = Tokenizer.load(MODEL)
    ids = windows(read_text(MODEL / "heldout.txt"), tokenizer, SEQ_LEN, WINDOWS)
    out = {
        **provenance([]),
        "command": "PYTHONPATH=tests python " + shlex.join(["benchmarks/outliers.py"]),
        "scheme": SCHEME,
        "calibration": CALIBRATED.to_dict(),
        "text": {"name": "heldout", "windows": WINDOWS, "seq_len": SEQ_LEN},
        "twins": [],
    }
    before = {row["name"]: row for row in known.get("twins", [])}
    for twin in twins():
        row: dict[str, Any] = {
            "name": twin.name,
            "base": twin.base,
            "table": twin.table,
            "outliers": asdict(twin.outliers) if twin.outliers else None,
            "bias": twin.bias,
            "commit": out["commit"],
            "results": {},
        }
        old = before.get(twin.name)
        if old and (old["outliers"], old["bias"]) == (row["outliers"], row["bias"]):
            row |= {key: old[key] for key in ("commit", "results")}
        out["twins"].append(row)
        with tempfile.TemporaryDirectory(prefix="qoq-outliers-") as folder:
            source = twin.write(Path(folder) / "twin")
            todo = {k: r for k, r in twin.recipes().items() if k not in row["results"]}
            if not todo:
                continue
            model = load_model(source)
            reference = Reference(model, ids)
            row["results"]["full precision"] = evaluate(model, ids).to_dict()
            for label, recipe in todo.items():
                result = evaluate(simulate(source, SCHEME, recipe, CALIBRATED), ids, reference)
                row["results"][label] = result.to_dict()
                text = f"ppl {result.perplexity:.3f} KL {result.kl_mean}"
                print(f"{twin.name}: {label}: {text}", flush=True)
                RESULTS.parent.mkdir(exist_ok=True)
                RESULTS.write_text(json.dumps(out, indent=2) + "\n")
            reference.close()
    RESULTS.write_text(json.dumps(out, indent=2) + "\n")
    return out


def render(measured: dict[str, Any]) -> dict[str, str]:
    """Marker name -> markdown."""
    rows = {row["name"]: row for row in measured["twins"]}
    shown: dict[str, list[list[str]]] = {"kinds": [], "unseen": []}
    for row in rows.values():
        base = rows[row["base"]]["results"]["QoQ"]
        results = row["results"]
        ideal, rtn, qoq = (results[n] for n in ("full precision", "RTN", "QoQ"))
        line = [
            row["name"],
            f"{rtn['perplexity'] / ideal['perplexity'] - 1:+.1%}",
            f"{rtn['kl_mean'] * 1e3:.1f}",
            f"{qoq['perplexity'] / ideal['perplexity'] - 1:+.2%}",
            f"{qoq['kl_mean'] * 1e3:.2f}",
        ]
        if row["table"] == "kinds":
            line += _without(results)
        else:
            line.append(f"{qoq['perplexity'] / base['perplexity'] - 1:+.2%}")
            line.append(f"{qoq['kl_mean'] / base['kl_mean']:.2f}")
        shown[row["table"]].append(line)
    heads = ["twin", "RTN: ppl", "KL", "QoQ: ppl", "KL"]
    calibration, machine = measured["calibration"], measured["hardware"]
    commits = dict.fromkeys(row["commit"] for row in rows.values())
    return {
        "outliers-kinds": _table([*heads, *(f"KL without {p}" for p in PASSES)], shown["kinds"]),
        "outliers-unseen": _table([*heads, "ppl / base", "KL / base"], shown["unseen"]),
        "outliers-provenance": "\n".join(
            [
                "```sh",
                measured["command"],
                "```",
                "",
                f"{measured['scheme']}, {measured['text']['windows']} windows of "
                f"{measured['text']['seq_len']} tokens of {measured['text']['name']}.txt, "
                f"calibrated on {calibration['samples']} samples of {calibration['seq_len']} "
                f"tokens of {calibration['source']}. Commit {', '.join(commits)}, "
                f"{measured['date']}, on {machine['cores']} cores of {machine['cpu']}, torch "
                f"{machine['torch']}.",
            ]
        ),
    }


def _without(results: dict[str, Any]) -> list[str]:
    """KL without each pass; bold where leaving the pass out doubles it and more."""
    cells = []
    for name in PASSES:
        kl = results[f"without {name}"]["kl_mean"]
        text = f"{kl * 1e3:.2f}"
        cells.append(f"**{text}**" if kl > 2 * results["QoQ"]["kl_mean"] else text)
    return cells


def _table(heads: list[str], lines: list[list[str]]) -> str:
    parts = [heads, ["---", *["---:"] * (len(heads) - 1)], *lines]
    return "\n".join(f"| {' | '.join(part)} |" for part in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--render", action="store_true", help="measure nothing")
    parser.add_argument("--continue", action="store_true", dest="keep")
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    measured = known if args.render else measure(known if args.keep else {})
    if not measured:
        sys.exit(f"There is no {RESULTS.relative_to(ROOT)} yet; run without --render first.")
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(fill(page, render(measured)), encoding="utf-8")


if __name__ == "__main__":
    main()
