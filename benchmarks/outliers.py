"""Which pass rescues which outlier: the bundled model's outlier twins, quantized and judged.

    PYTHONPATH=tests python benchmarks/outliers.py             # measure, then fill docs/outliers.md
    PYTHONPATH=tests python benchmarks/outliers.py --render    # only fill the page again

Results go to benchmarks/results/outliers.json after every case; ``--continue`` keeps those that
are there. About 45 quantizations of the bundled model, half an hour on two cores.
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

from helpers.outliers import Outliers, write_qwen2, write_twin
from qoq.evaluate.perplexity import Reference, evaluate
from qoq.evaluate.provenance import provenance
from qoq.evaluate.render import fill, grid
from qoq.evaluate.simulate import Calibrated, simulate
from qoq.evaluate.texts import read_text, windows
from qoq.models.load import load_model
from qoq.quantize.recipe import PASS_NAMES, QOQ, RTN, Recipe
from qoq.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "examples" / "books-llama"
RESULTS = ROOT / "benchmarks" / "results" / "outliers.json"
PAGE = ROOT / "docs" / "outliers.md"
SCHEME = "w4a8kv4-g128"
CALIBRATED = Calibrated(str(MODEL / "calibration.txt"), samples=16, seq_len=1024)
WINDOWS, SEQ_LEN = 3, 2048
PASSES = ("rotate", "center-keys", "smooth-attention", "smooth-outputs")
RESCUERS = {
    "norms": "rotate",
    "keys": "smooth-attention",
    "up": "smooth-outputs",
    "values": "smooth-outputs",
}
BASES = ("original", "original, theta 1e6")


@dataclass(frozen=True)
class Twin:
    """A model to make and quantize; ``base`` names the one it is compared with."""

    name: str
    outliers: Outliers | None = None
    bias: dict[str, Any] | None = None  # arguments of write_qwen2; None: stay a Llama
    base: str = BASES[0]
    rescued_by: tuple[str, ...] = ()  # the passes to leave out of QoQ
    table: str = "kinds"

    def write(self, folder: Path) -> Path:
        if self.bias is not None:
            return write_qwen2(MODEL, folder, outliers=self.outliers, **self.bias)
        return MODEL if self.outliers is None else write_twin(MODEL, folder, self.outliers)

    def recipes(self) -> dict[str, Recipe]:
        found = {"RTN": RTN, "QoQ": QOQ}
        if self.table == "kinds":
            found |= {f"RTN + {name}": alone(name) for name in self.rescued_by}
            found |= {f"without {name}": QOQ.without(name) for name in self.rescued_by}
        return found


def alone(name: str) -> Recipe:
    """Rounding to nearest with one pass of QoQ."""
    field = PASS_NAMES[name]
    alphas = QOQ.smooth_output_alphas
    return replace(RTN, smooth_output_alphas=alphas, **{field: getattr(QOQ, field)})


def twins() -> Iterator[Twin]:
    yield Twin(BASES[0], rescued_by=PASSES)
    for kind, name in RESCUERS.items():
        yield Twin(kind, Outliers(kinds=(kind,)), rescued_by=(name,))
    yield Twin("all four", Outliers())
    yield Twin(BASES[1], bias={"size": 0.0})
    keys = ("center-keys", "smooth-attention")
    yield Twin("key bias, layer 0", bias={}, base=BASES[1], rescued_by=keys[:1])
    yield Twin("key bias, all layers", bias={"layers": 6}, base=BASES[1], rescued_by=keys)
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
    calibration, machine = measured["calibration"], measured["hardware"]
    commits = dict.fromkeys(row["commit"] for row in rows.values())
    kinds = [row for row in rows.values() if row["table"] == "kinds"]
    heads = ["twin", "RTN: ppl", "KL", "QoQ: ppl", "KL"]
    versus = [*heads, "ppl / base", "KL / base"]
    left_out = [f"KL without {name}" for name in PASSES]
    return {
        "outliers-nearest": grid(
            ["twin", "RTN", *(f"+ {name}" for name in PASSES)], [_nearest(row) for row in kinds]
        ),
        "outliers-kinds": grid(
            [*heads, *left_out], [_figures(row) + _without(row["results"]) for row in kinds]
        ),
        "outliers-unseen": grid(
            versus,
            [
                _figures(row) + _versus(row["results"], rows[row["base"]]["results"])
                for row in rows.values()
                if row["name"] not in BASES
            ],
        ),
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


def _nearest(row: dict[str, Any]) -> list[str]:
    """KL of rounding to nearest, alone and with one pass; bold where the pass halves it."""
    kl = {label: result.get("kl_mean") for label, result in row["results"].items()}
    cells = [row["name"], f"{kl['RTN'] * 1e3:.1f}"]
    for name in PASSES:
        value = kl.get(f"RTN + {name}")  # measured where the pass should rescue
        text = "" if value is None else f"{value * 1e3:.1f}"
        cells.append(f"**{text}**" if value is not None and value < kl["RTN"] / 2 else text)
    return cells


def _figures(row: dict[str, Any]) -> list[str]:
    """Name, then change of perplexity and KL of RTN and QoQ."""
    results, cells = row["results"], [row["name"]]
    ideal = results["full precision"]["perplexity"]
    for label in ("RTN", "QoQ"):
        cells.append(f"{results[label]['perplexity'] / ideal - 1:+.2%}")
        cells.append(f"{results[label]['kl_mean'] * 1e3:.2f}")
    return cells


def _versus(results: dict[str, Any], base: dict[str, Any]) -> list[str]:
    """QoQ beside QoQ on the base: perplexity as each loses it, and KL."""
    lost = [r["QoQ"]["perplexity"] / r["full precision"]["perplexity"] for r in (results, base)]
    return [
        f"{lost[0] / lost[1] - 1:+.2%}",
        f"{results['QoQ']['kl_mean'] / base['QoQ']['kl_mean']:.2f}",
    ]


def _without(results: dict[str, Any]) -> list[str]:
    """KL without a pass, where it was measured; bold where leaving the pass out doubles it."""
    cells = []
    for name in PASSES:
        result = results.get(f"without {name}")
        text = f"{result['kl_mean'] * 1e3:.2f}" if result else ""
        bold = result and result["kl_mean"] > 2 * results["QoQ"]["kl_mean"]
        cells.append(f"**{text}**" if bold else text)
    return cells


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
