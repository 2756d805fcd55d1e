"""Recorded conversations: which are asked, and for how many tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.openai_server import echo_server
from helpers.tiny import write_byte_tokenizer
from helpers.verbs import answer
from qoq.bench.sharegpt import sharegpt_asks
from qoq.errors import RequestError
from qoq.tokenizer import Tokenizer


def talk(*words: int) -> dict[str, Any]:
    """A conversation whose turns have this many words."""
    speakers = ["human", "gpt"] * len(words)
    turns = [
        {"from": who, "value": " ".join(f"w{i}x{count}" for i in range(count))}
        for who, count in zip(speakers, words, strict=False)
    ]
    return {"id": "x", "conversations": turns}


def write(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def test_what_is_kept(tmp_path: Path) -> None:
    file = write(
        tmp_path / "talks.json",
        [
            talk(10, 20, 30),
            talk(10),  # nobody answers
            talk(),
            talk(3, 50),
            talk(50, 3),
            talk(4, 4),
            talk(1025, 10),
            talk(1024, 1024),
            talk(1024, 1025),
            {"conversations": None},
            {},
            7,
            {"conversations": [{"from": "human"}, {"value": "a b c d e"}]},
        ],
    )
    asks = sharegpt_asks(file, 3, seed=1)
    sizes = sorted((len(ask.prompt.split()), ask.max_tokens) for ask in asks)
    assert sizes == [(4, 4), (10, 20), (1024, 1024)]
    again = sharegpt_asks(file, 7, seed=1)
    assert again[:3] == again[3:6] == asks
    fixed = sharegpt_asks(file, 20, seed=1, output_len=9)
    assert {ask.max_tokens for ask in fixed} == {9}
    assert len({ask.prompt for ask in fixed}) == 4  # a short answer is no matter here


def test_the_seed_orders(tmp_path: Path) -> None:
    file = write(tmp_path / "talks.json", [talk(5 + i, 5) for i in range(40)])
    orders = [tuple(ask.prompt for ask in sharegpt_asks(file, 10, seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_tokens_are_the_tokenizer_s(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    file = write(tmp_path / "talks.json", [talk(3, 3)])
    with pytest.raises(RequestError, match="No conversation"):
        sharegpt_asks(file, 1, 0)
    [ask] = sharegpt_asks(file, 1, 0, tokenizer)
    assert ask.max_tokens == len(tokenizer.encode(talk(3, 3)["conversations"][1]["value"]))


@given(
    st.recursive(
        st.none() | st.integers() | st.text(),
        lambda x: st.lists(x) | st.fixed_dictionaries({"conversations": x}),
    )
)
@settings(deadline=None)
def test_other_json_is_refused(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    file = write(tmp_path_factory.mktemp("x") / "f.json", value)
    with pytest.raises(RequestError, match=r"f\.json"):
        sharegpt_asks(file, 1, 0)


def test_files_that_are_none(tmp_path: Path) -> None:
    file = tmp_path / "f.json"
    with pytest.raises(RequestError, match="cannot be read"):
        sharegpt_asks(file, 1, 0)
    file.write_text('{"a": ', encoding="utf-8")
    with pytest.raises(RequestError, match="cannot be read"):
        sharegpt_asks(file, 1, 0)
    with pytest.raises(RequestError, match="--sharegpt-output-len"):
        sharegpt_asks(file, 1, 0, output_len=0)


def test_the_verb(tmp_path: Path) -> None:
    file = write(tmp_path / "talks.json", [talk(5, 7), talk(6, 4)])
    with echo_server() as echo:
        base = ("bench", "serve", "--base-url", echo.base_url, "--num-prompts", 6)
        got = answer(*base, "--dataset", "sharegpt", "--dataset-path", file)
        assert (got["dataset_name"], got["completed"]) == ("sharegpt", 6)
        assert got["total_output_tokens"] == 3 * (7 + 4)
        assert got["total_input_tokens"] == 3 * (5 + 6)
        echo.bodies.clear()
        more = ("--backend", "openai-chat", "--sharegpt-output-len", 2)
        answer(*base, "--dataset-name", "sharegpt", "--dataset-path", file, *more)
        assert {body["max_tokens"] for body in echo.bodies} == {2}
        assert echo.bodies[0]["messages"][0]["role"] == "user"
