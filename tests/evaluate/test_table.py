"""Rows as data, and each measured once against one reference."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qoq.errors import SchemeError
from qoq.evaluate import table
from qoq.evaluate.cases import GROUP, Case, active_passes, make_tables, up_to
from qoq.evaluate.perplexity import evaluate
from qoq.evaluate.simulate import Calibrated
from qoq.evaluate.table import Row, known_results, measure
from qoq.models.load import load_model
from qoq.quantize.pipeline import quantize
from qoq.quantize.recipe import PASS_NAMES, QOQ, RTN, Recipe

SIMPLE = Recipe("simple", rotate=True, center_keys=True)


@pytest.fixture
def texts() -> dict[str, Tensor]:
    return {"one": torch.randint(3, 200, (2, 24)), "two": torch.randint(3, 200, (1, 40))}


@pytest.fixture
def calibrated(tiny: Path) -> Calibrated:
    return Calibrated(str(tiny / "calibration.txt"), samples=2, seq_len=32)


def test_passes_are_added_in_order_up_to_the_whole_recipe() -> None:
    passes = active_passes(QOQ)
    assert passes == [name for name in PASS_NAMES if name in passes]
    for count, name in enumerate(passes, 1):
        assert active_passes(up_to(QOQ, name)) == passes[:count]
    cases = make_tables("accuracy")["accuracy"]
    steps = [case for case in cases if case.step]
    assert [case.label for case in steps] == [f"+ {name}" for name in passes]
    final = next(case for case in cases if case.label == "QoQ, g128")
    assert steps[-1].key == final.key
    assert len({case.key for case in steps}) == len(passes)


def test_the_tables_hold_what_the_docs_promise() -> None:
    full = make_tables("full")
    assert set(full) == {"accuracy", "parts", "keys", "leave-one-out"}
    labels = [case.label for case in full["accuracy"]]
    assert labels[:4] == ["full precision", "W8A8", "RTN, per channel", "RTN, g128"]
    assert labels[-4:] == [
        "published QoQ, per channel",
        "published QoQ, g128",
        "QoQ, per channel",
        "QoQ, g128",
    ]
    by_recipe = [case.recipe.name for case in full["parts"]]
    assert by_recipe == ["rtn", "qoq"] * 6
    left_out = full["leave-one-out"][1:]
    assert [case.label for case in left_out] == [f"without {p}" for p in active_passes(QOQ)]
    for case, name in zip(left_out, active_passes(QOQ), strict=True):
        assert set(active_passes(QOQ)) - set(active_passes(case.recipe)) == {name}


def test_quick_rows_take_a_checkpoint_for_the_recipe() -> None:
    quick = make_tables("quick")["accuracy"]
    assert [c.label for c in quick][-2:] == ["published QoQ, g128", "QoQ, g128"]
    given = make_tables("quick", checkpoints=(Path("a/out"),))["accuracy"]
    assert [c.label for c in given][-2:] == ["published QoQ, g128", "checkpoint out"]
    with pytest.raises(SchemeError, match="no set of rows"):
        make_tables("most")


def test_names_of_recipes_do_not_make_cases_differ() -> None:
    a, b = Recipe("a", rotate=True), Recipe("b", rotate=True)
    assert Case("x", GROUP, a).key == Case("y", GROUP, b).key != Case("z", GROUP).key


def test_measured_rows_are_single_evaluations(
    tiny: Path,
    tmp_path: Path,
    texts: dict[str, Tensor],
    calibrated: Calibrated,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = quantize(tiny, tmp_path / "out", scheme="w4a8kv4-g32", recipe=RTN)
    simulated: list[str] = []
    real = table.simulate

    def counted(source, scheme, recipe, *rest, **more):  # type: ignore[no-untyped-def]
        simulated.append(scheme)
        return real(source, scheme, recipe, *rest, **more)

    monkeypatch.setattr(table, "simulate", counted)
    cases = {
        "accuracy": [Case("full"), Case("r", GROUP), Case("s", GROUP, SIMPLE)],
        "more": [Case("again", GROUP), Case("c", checkpoint=out)],
    }
    seen: list[tuple[str, str]] = []
    told: list[tuple[int, int, str]] = []
    rows = measure(
        tiny,
        cases,
        texts,
        calibrated,
        report=lambda *at: told.append(at),
        finished=lambda name, row: seen.append((name, row.case.label)),
    )
    assert simulated == [GROUP, GROUP]  # "again" is "r"
    assert seen == [(name, case.label) for name, part in cases.items() for case in part]
    assert told[-1] == (5, 5, "c")
    assert rows["more"][0].results == rows["accuracy"][1].results
    source, packed = load_model(tiny), load_model(out)
    for name, windows in texts.items():
        assert rows["accuracy"][0].results[name].kl_mean == 0
        assert rows["more"][1].results[name] == evaluate(packed, windows, source)
        assert rows["accuracy"][1].results[name].kl_mean > 0  # type: ignore[operator]


def test_saved_rows_are_taken_over(
    tiny: Path, texts: dict[str, Tensor], calibrated: Calibrated, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = {"accuracy": [Case("full"), Case("r", GROUP)]}
    rows = measure(tiny, cases, texts, calibrated)
    saved = {"tables": {"accuracy": [row.to_dict() for row in rows["accuracy"]]}}
    wanted = {"t": [Case("renamed", GROUP, Recipe("other")), Case("new", "w8a8"), Case("full")]}
    known = known_results(saved, wanted)
    assert set(known) == {wanted["t"][0].key, wanted["t"][2].key}
    monkeypatch.setattr(table, "simulate", None)  # it must not be called
    again = measure(tiny, {"t": [wanted["t"][0]]}, texts, calibrated, known=known)
    assert again["t"][0].results == rows["accuracy"][1].results


def test_a_checkpoint_is_always_measured_anew() -> None:
    saved = {"tables": {"a": [Row(Case("c", checkpoint=Path("out")), {}).to_dict()]}}
    cases = {"a": [Case("c", checkpoint=Path("out")), Case("full")]}
    assert known_results(saved, cases) == {}
