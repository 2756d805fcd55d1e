"""Many schemes judged on the same texts: the rows of the accuracy tables, as numbers."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from qoq.evaluate.cases import Case, recipe_numbers
from qoq.evaluate.perplexity import Reference, Result, evaluate
from qoq.evaluate.simulate import Calibrated, simulate
from qoq.models.load import LoadedModel, load_model

Report = Callable[[int, int, str], None]
"""report(rows done, rows in all, what is going on)."""

Results = dict[str, Result]
"""By text name."""


@dataclass(frozen=True)
class Row:
    """A case and what came out."""

    case: Case
    results: Results

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "label": self.case.label,
            "scheme": self.case.scheme,
            "recipe": None if self.case.scheme is None else self.case.recipe.to_dict(),
            "checkpoint": None if self.case.checkpoint is None else self.case.checkpoint.name,
            "step": self.case.step,
            "results": {name: result.to_dict() for name, result in self.results.items()},
        }


def measure(
    source: Path,
    tables: Mapping[str, Sequence[Case]],
    texts: Mapping[str, Tensor],
    calibrated: Calibrated,
    *,
    known: Mapping[tuple[str, ...], Results] | None = None,
    report: Report | None = None,
    finished: Callable[[str, Row], None] | None = None,
    device: str = "cpu",
) -> dict[str, list[Row]]:
    """Judge every case on every text (name -> windows int64 [n, seq_len]) against ``source``.

    The source runs once per text, equal cases once altogether; ``known`` results by case key are
    taken as they are. ``finished(table, row)`` is told of each row when it is there.
    """
    total = sum(map(len, tables.values()))
    out: dict[str, list[Row]] = {name: [] for name in tables}
    done = 0

    def tell(what: str) -> None:
        if report:
            report(done, total, what)

    with _Judge(source, texts, calibrated, dict(known or {}), device) as judge:
        for table, cases in tables.items():
            for case in cases:
                row = Row(case, judge(case, tell))
                out[table].append(row)
                done += 1
                tell(case.label)
                if finished:
                    finished(table, row)
    return out


class _Judge:
    """Results by case, each worked out once; references are made when first needed."""

    def __init__(
        self,
        source: Path,
        texts: Mapping[str, Tensor],
        calibrated: Calibrated,
        results: dict[tuple[str, ...], Results],
        device: str,
    ) -> None:
        self._source, self._texts, self._calibrated = source, texts, calibrated
        self._results = results
        self._device = device
        self._original = load_model(source, device=device)
        self._references: dict[str, Reference] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for reference in self._references.values():
            reference.close()

    def __call__(self, case: Case, tell: Callable[[str], None]) -> Results:
        if case.key not in self._results:
            for name, windows in self._texts.items():
                if name not in self._references:
                    tell(f"full precision on {name}")
                    self._references[name] = Reference(self._original, windows)
            model = self._load(case, tell)
            results: Results = {}
            for name, windows in self._texts.items():
                tell(f"{case.label} on {name}")
                results[name] = evaluate(model, windows, self._references[name])
            self._results[case.key] = results
        return self._results[case.key]

    def _load(self, case: Case, tell: Callable[[str], None]) -> LoadedModel:
        if case.checkpoint is not None:
            return load_model(case.checkpoint, device=self._device)
        if case.scheme is None:
            return self._original
        return simulate(
            self._source,
            case.scheme,
            case.recipe,
            self._calibrated,
            device=self._device,
            steps=lambda _, __, what: tell(f"{case.label}: {what}"),
        )


def known_results(
    saved: Mapping[str, Any], tables: Mapping[str, Sequence[Case]]
) -> dict[tuple[str, ...], Results]:
    """Results of an earlier measurement (its JSON) that cases of ``tables`` can take over."""
    found = {
        _identity(row["scheme"], row["recipe"]): {
            name: Result(**values) for name, values in row["results"].items()
        }
        for rows in saved.get("tables", {}).values()
        for row in rows
        if row.get("checkpoint") is None
    }
    known = {}
    for case in (case for cases in tables.values() for case in cases):
        identity = _identity(case.scheme, recipe_numbers(case.recipe) if case.scheme else None)
        if case.checkpoint is None and identity in found:
            known[case.key] = found[identity]
    return known


def _identity(scheme: str | None, recipe: Mapping[str, Any] | None) -> str:
    numbers = {key: value for key, value in (recipe or {}).items() if key != "name"}
    return json.dumps([scheme, numbers], sort_keys=True)
