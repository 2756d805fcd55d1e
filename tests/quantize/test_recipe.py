"""Recipes are data: to JSON and back, one pass off at a time, bad ones refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from qoq.errors import SchemeError
from qoq.formats.scheme import QuantScheme
from qoq.quantize.recipe import PASS_NAMES, QOQ, RECIPES, Recipe, load_recipe

G128, PER_CHANNEL = QuantScheme.parse("w4a8kv4-g128"), QuantScheme.parse("w4a8kv4")


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_json_and_back(recipe: Recipe) -> None:
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize("name", PASS_NAMES)
def test_one_pass_off(name: str) -> None:
    field = PASS_NAMES[name]
    changed = QOQ.without(name)
    assert not getattr(changed, field)
    assert changed.name == f"qoq-without-{name}"
    for other in set(PASS_NAMES.values()) - {field}:
        assert getattr(changed, other) == getattr(QOQ, other)


def test_passes_that_do_not_exist() -> None:
    with pytest.raises(SchemeError, match=r"pass 'rotation'; passes: rotate, center-keys"):
        QOQ.without("rotation")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"rotated": True}, r"fields \['rotated'\]; known: .*rotate"),
        ({"rotate": 1}, "rotate must be a bool, not 1"),
        ({"gptq": "yes"}, "gptq must be a bool"),
        ({"damping": "0.1"}, "damping must be a float"),
        ({"damping": True}, "damping must be a float"),
        ({"refine_sweeps": 1.5}, "refine_sweeps must be a int"),
        ({"refine_sweeps": True}, "refine_sweeps must be a int"),
        ({"reorder": "mlp.down_proj"}, "reorder must be a tuple"),
    ],
)
def test_bad_fields(data: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        Recipe.from_dict(data)


def test_whole_numbers_pass_for_floats() -> None:
    assert Recipe.from_dict({"compensate": 1}).compensate == 1.0
    assert Recipe.from_dict({}).name == "custom"


def test_names_and_files(tmp_path: Path) -> None:
    assert load_recipe("qoq", G128) is QOQ
    assert load_recipe("published", G128).name == "published-g128"
    assert load_recipe("published", PER_CHANNEL).name == "published-per-channel"
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(QOQ.without("rotate").to_dict()))
    assert load_recipe(str(path), G128) == QOQ.without("rotate")


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_bad_files(content: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(SchemeError, match=r"bad\.json"):
        load_recipe(str(path), G128)


@pytest.mark.parametrize("name", ["", "qoq2", "gone.json"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(SchemeError, match=r"Unknown recipe .*published, qoq, rtn"):
        load_recipe(name, G128)
