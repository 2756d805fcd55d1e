"""Structural tags: text is free, and what a trigger begins has its schema."""

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from helpers.tiny import EOS, write_byte_tokenizer
from qoq.engine.structured import Grammars
from qoq.engine.structured_params import StructuredOutputsParams
from qoq.errors import RequestError
from qoq.tokenizer import Tokenizer

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Köln"]}},
    "required": ["city"],
    "additionalProperties": False,
}
# One that llguidance knows by its flag, one by its looks, one that it takes for text, one that only
# looks special and is no mark.
ADDED = (
    AddedToken("[ARGS]", special=True),
    AddedToken("<call>", special=False),
    AddedToken("[CALL]", special=False),
    AddedToken("<think>", special=False),
)
TAG = {
    "triggers": ["<call>", "[CALL]", "{{"],
    "structures": [
        {"begin": '<call>{"name": "f", ', "schema": CITY, "end": "}\n"},
        {"begin": '<call>{"name": "g", ', "schema": True, "end": "}\n"},
        {"begin": "[CALL]f[ARGS]", "schema": CITY, "end": ""},
        {"begin": "{{", "schema": {"type": "boolean"}, "end": "}}"},
    ],
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tags")
    write_byte_tokenizer(folder)
    made = Tokenizer.load(folder)
    made.hf.add_tokens(list(ADDED))
    made.hf.save_pretrained(folder)
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, len(tokenizer))


def written(tokenizer: Tokenizer, grammars: Grammars, text: str, **keys: Any) -> str:
    """As much of the text as is allowed, and "$" if it may end there."""
    m = grammars.matcher(StructuredOutputsParams(structural_tag={**TAG, **keys}), [EOS])
    ids = tokenizer.encode(text, special=False)
    for at, i in enumerate(ids):
        if not m.allowed()[i]:
            return tokenizer.decode(ids[:at], skip_special=False)
        m.accept(i)
    assert m.error is None
    return text + "$" * bool(m.allowed()[EOS])


def spelled_out(text: str, upto: str) -> str:
    """What ``written`` gives: "$" is all of it, "..." all of it without an end."""
    return {"$": text + "$", "...": text}.get(upto, upto)


@pytest.mark.parametrize(
    ("text", "upto"),
    [
        ("", "$"),
        ("free { text } <cal [CAL], <think>a b</think> thoughts", "$"),
        ('<call>{"name": "f", {"city": "Rome"}}\n', "$"),
        ('So: <call>{"name": "g", [1, 2]}\n<call>{"name": "f", {"city": "Köln"}}\n bye', "$"),
        ('<think>a [CALL]f[ARGS]{"city": "Rome"} and {{true}}{{false}}', "$"),
        ('<call>{"name": "f", {"city": "Rome"', "..."),
        ('<call>{"name": "h"', '<call>{"name": "'),
        ('<call>{"name": "f", {"city": "P', '<call>{"name": "f", {"city": "'),
        ("[CALL]f{", "[CALL]f"),
        ("a {{tell", "a {{t"),
        ("a [ARGS]", "a "),
    ],
)
def test_what_may_be_written(
    tokenizer: Tokenizer, grammars: Grammars, text: str, upto: str
) -> None:
    assert written(tokenizer, grammars, text) == spelled_out(text, upto)


@pytest.mark.parametrize(
    ("text", "upto"),
    [
        ('{"city": "Rome"}', "$"),
        ('<call>{"name": "g", 1}\n\n[CALL]f[ARGS]{"city": "Rome"} {{true}}\n', "$"),
        ("{{false}}", "$"),
        ("{", "..."),
        ("So: ", ""),
        ('{{true}} {"city"', "{{true}} {"),
        (" {{true}}", ""),
        ('{"city": "Rome"}<call>', '{"city": "Rome"}'),
    ],
)
def test_structures_or_json(tokenizer: Tokenizer, grammars: Grammars, text: str, upto: str) -> None:
    assert written(tokenizer, grammars, text, otherwise=CITY) == spelled_out(text, upto)


@pytest.mark.parametrize(
    ("text", "upto"),
    [
        ("", "$"),
        ("{ {a} <think>{{true}}", "$"),
        ("a {{tell", "$"),
        ("{{true}}", "$"),
        (" {{true", " {"),
        ('<call>{"name": "f", {"city": "Köln"}}\n', "$"),
        ("{{true}} {{", "{{true}}"),
    ],
)
def test_only_at_the_start(tokenizer: Tokenizer, grammars: Grammars, text: str, upto: str) -> None:
    assert written(tokenizer, grammars, text, at_start=True) == spelled_out(text, upto)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_walk_keeps_to_it(tokenizer: Tokenizer, data: st.DataObject) -> None:
    tag = {
        "triggers": ["a"],
        "structures": [{"begin": "a:", "schema": {"type": "boolean"}, "end": ";"}],
    }
    m = Grammars(tokenizer, len(tokenizer)).matcher(StructuredOutputsParams(structural_tag=tag))
    pieces = []
    favourites = [i for text in ("a", "b", "tell :;") for i in tokenizer.encode(text)]
    for _ in range(60):
        allowed = m.allowed()
        likely = [i for i in favourites if allowed[i]]
        one = data.draw(st.sampled_from(likely or allowed.nonzero()[0].tolist()))
        m.accept(one)
        pieces.append(one)
    text = tokenizer.decode(pieces, skip_special=False)
    assert re.match(r"([^a]|a:(true|false);)*(a|a:|a:t\w*|a:f\w*|)$", text), text


@pytest.mark.parametrize(
    "tag",
    [
        {},
        True,
        [],
        "{",
        {"structures": [], "triggers": ["a"]},
        {"structures": [{"begin": "b", "schema": {}, "end": ""}], "triggers": ["a"]},
        {"structures": [{"begin": "a", "schema": {}}], "triggers": ["a"]},
        {"structures": [{"begin": "a", "schema": 3, "end": ""}], "triggers": ["a"]},
        {"structures": [{"begin": "a", "schema": {}, "end": ""}], "triggers": ["a", ""]},
        {"structures": ["a"], "triggers": ["a"]},
        {"format": {"type": "triggered_tags"}},
        {**TAG, "otherwise": "JSON"},
        {**TAG, "otherwise": {}, "at_start": True},
    ],
)
def test_what_is_none(tag: Any) -> None:
    with pytest.raises(RequestError, match="structural_tag"):
        StructuredOutputsParams(structural_tag=tag)


def test_what_cannot_be_followed(grammars: Grammars) -> None:
    def refused(**change: Any) -> str:
        structure = {"begin": "a[ARGS]", "schema": {}, "end": "", **change}
        tag = json.dumps({"structures": [structure], "triggers": [change.get("begin", "a")]})
        with pytest.raises(RequestError) as caught:
            grammars.matcher(StructuredOutputsParams(structural_tag=tag))
        return str(caught.value)

    assert "only in front" in refused(begin="a[ARGS]")
    assert "foo" in refused(schema={"type": "foo"})
    assert "at most" in refused(schema={"description": "a" * (300 << 10)})
