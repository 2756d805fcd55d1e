"""Tables and pictures of `qoq bench crossover` for docs/performance.md."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qoq.bench.crossover import BASELINE, Point, picture
from qoq.evaluate.render import grid

Run = dict[str, Any]


def table(runs: Iterable[Run]) -> str:
    """A table per run: a line per system, a column per M, times as fast as torch's bf16."""
    parts = []
    for run in runs:
        at = {(point["system"], point["M"]): point["seconds"] for point in run["points"]}
        sizes = sorted({m for _, m in at})
        lines = [
            [system, *(f"{at[BASELINE, m] / at[system, m]:.2f}x" for m in sizes)]
            for system in dict.fromkeys(system for system, _ in at)
        ]
        title = f"{run['linear']} of {run['shape']}, {run['isa']}, {run['threads']} threads"
        parts.append(f"{title}\n\n" + grid(["", *(f"M {m}" for m in sizes)], lines))
    return "\n\n".join(parts)


def pictures(runs: Iterable[Run], folder: Path) -> None:
    """One SVG per run, named after its shape."""
    for run in runs:
        points = [Point(**point) for point in run["points"]]
        title = f"{run['linear']} of {run['shape']}, {run['isa']}, {run['threads']} threads"
        picture(points, title, folder / f"crossover-{run['shape']}.svg")
