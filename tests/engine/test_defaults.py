"""Sampling parameters that come with a model, and n texts from one seed."""

import json
from pathlib import Path
from typing import Any

import pytest

from qoq.engine.choices import choices
from qoq.engine.defaults import sampling_defaults, with_defaults
from qoq.engine.request import SamplingParams
from qoq.errors import RequestError, SourceError


def write(folder: Path, content: Any) -> Path:
    (folder / "generation_config.json").write_text(
        content if isinstance(content, str) else json.dumps(content)
    )
    return folder


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ({}, {}),
        (
            {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "do_sample": True, "eos_token_id": 1},
            {"temperature": 0.6, "top_k": 20, "top_p": 0.9},
        ),
        ({"temperature": 0.6, "do_sample": False}, {"temperature": 0.0}),
        (
            {"max_new_tokens": 7, "repetition_penalty": 1.1, "min_p": None},
            {"max_tokens": 7, "repetition_penalty": 1.1},
        ),
    ],
)
def test_what_the_file_says(tmp_path: Path, content: Any, wanted: dict[str, Any]) -> None:
    assert sampling_defaults(write(tmp_path, content)) == wanted


def test_no_file_says_nothing(tmp_path: Path) -> None:
    assert sampling_defaults(tmp_path) == {}


@pytest.mark.parametrize("content", ["{", "[1]", {"temperature": -1}, {"top_k": "many"}])
def test_files_that_cannot_be(tmp_path: Path, content: Any) -> None:
    with pytest.raises(SourceError, match=r"generation_config\.json"):
        sampling_defaults(write(tmp_path, content))


def test_what_is_given_comes_first() -> None:
    params = with_defaults(
        {"temperature": 0.6, "top_k": 9}, temperature=0, top_p=None, max_tokens=3
    )
    assert params == SamplingParams(temperature=0, top_k=9, max_tokens=3)
    with pytest.raises(RequestError, match="top_p must be"):
        with_defaults({"top_k": 9}, top_p=2)


def test_choices_have_seeds_of_their_own() -> None:
    params = SamplingParams(n=4, seed=7, temperature=1)
    each = choices(params)
    assert each == choices(params)
    assert [p.n for p in each] == [1] * 4
    assert each[0].seed == 7
    seeds = {p.seed for s in range(50) for p in choices(SamplingParams(n=20, seed=s))}
    assert len(seeds) == 1000
    assert {p.seed for p in choices(SamplingParams(n=3))} == {None}
