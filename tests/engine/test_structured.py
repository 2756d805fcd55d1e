"""Structured output: what is drawn has the form asked for, and what explodes is cut off."""

import gc
import json
import math
import re
import time
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.sampling import choose
from helpers.tiny import EOS, write_byte_tokenizer, write_fallback_tokenizer
from qoq.engine.request import Request, SamplingParams
from qoq.engine.sampler import Sampler
from qoq.engine.structured import Grammars, StructureMatcher
from qoq.engine.structured_params import StructuredOutputsParams
from qoq.errors import RequestError
from qoq.tokenizer import Tokenizer

PADDING = 5  # rows of logits are often longer than the vocabulary
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["cat", "dog", None]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", params=[write_byte_tokenizer, write_fallback_tokenizer])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    request.param(folder)
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, len(tokenizer) + PADDING)


@cache
def sampler_of(tokenizer: Tokenizer) -> Sampler:
    """One for many texts: its grammars have a process of their own."""
    return Sampler(len(tokenizer) + PADDING, tokenizer)


def write(
    tokenizer: Tokenizer, structure: StructuredOutputsParams, seed: int, **params: Any
) -> Request:
    """A text drawn from random logits."""
    size = len(tokenizer) + PADDING
    asked = SamplingParams(
        **{"max_tokens": 400, "temperature": 1.0, "seed": seed, **params},
        structured_outputs=structure,
    )
    r = Request([5], asked, max_length=1 + asked.max_tokens, eos_ids=(EOS,), tokenizer=tokenizer)
    sampler = sampler_of(tokenizer)
    sampler.admit(r, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    spaces = [i for i in range(size) if not tokenizer.decode([i]).strip()]
    while r.finish_reason is None:
        logits = torch.randn(1, size, generator=generator)
        logits[0, spaces] -= 8  # whitespace is allowed for ever
        choose(sampler, [r], logits)
    return r


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_json_schema(tokenizer: Tokenizer, seed: int) -> None:
    r = write(tokenizer, StructuredOutputsParams(json=PERSON), seed)
    assert r.finish_reason == "stop"
    value = json.loads(r.text)
    assert list(value) == ["name", "age", "kind", "tags"]
    assert isinstance(value["name"], str)
    assert 0 <= value["age"] <= 99
    assert value["kind"] in ("cat", "dog", None)
    assert all(isinstance(tag, bool) for tag in value["tags"])


def test_nothing_holds_a_text_that_is_over(tokenizer: Tokenizer) -> None:
    structure = StructuredOutputsParams(regex="[ab]{3}")
    held = weakref.ref(write(tokenizer, structure, 0, repetition_penalty=1.1, bad_words=["aab"]))
    gc.collect()
    assert held() is None


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31))
@pytest.mark.parametrize("pattern", [r"[a-c]{3,5}", r"(ab|cd)*x", r"[0-9]{2}-[0-9]{2}", "é+|z"])
def test_regex(tokenizer: Tokenizer, pattern: str, seed: int) -> None:
    r = write(tokenizer, StructuredOutputsParams(regex=pattern), seed, max_tokens=400)
    if r.finish_reason == "stop":
        assert re.fullmatch(pattern, r.text)
    else:
        assert len(r.token_ids) == 400


def test_choice_text_is_taken_literally(tokenizer: Tokenizer) -> None:
    wanted = ["a.b", "c|d", "[x](y) {1}", "é\n\\", "hello", "^$*+?#&-~/<>@\"'"]
    structure = StructuredOutputsParams(choice=wanted)
    seen = {write(tokenizer, structure, seed).text for seed in range(60)}
    assert seen == set(wanted)


@pytest.mark.parametrize(
    "grammar",
    [
        'root ::= "a" tail\ntail ::= "b" | "c" tail\n',
        'start: "a" tail\ntail: "b" | "c" tail\n',
    ],
)
def test_grammar_in_both_notations(tokenizer: Tokenizer, grammar: str) -> None:
    for seed in range(5):
        r = write(tokenizer, StructuredOutputsParams(grammar=grammar), seed)
        assert re.fullmatch("ac*b", r.text)


def test_json_object_is_an_object(tokenizer: Tokenizer) -> None:
    structure = StructuredOutputsParams(json_object=True)
    assert write(tokenizer, structure, 3, max_tokens=1).text == "{"


def test_mask_is_what_can_still_become_a_choice(tokenizer: Tokenizer, grammars: Grammars) -> None:
    wanted = ["hello", "hell no", "he", "abc"]
    m = grammars.matcher(StructuredOutputsParams(choice=wanted), [EOS])
    size = len(tokenizer)
    pieces = {i: _bytes_of(tokenizer, i) for i in range(3, size)}
    text = b""
    for letter in "hell":
        possible = [w.encode() for w in wanted]
        expected = {
            i for i, p in pieces.items() if any(w.startswith(text + p) for w in possible)
        } | ({EOS} if text in possible else set())
        assert set(m.allowed().nonzero()[0].tolist()) == expected
        one = next(i for i, p in pieces.items() if p == letter.encode())
        assert not m.accept(one)
        text += letter.encode()


def _bytes_of(tokenizer: Tokenizer, i: int) -> bytes:
    """What an id stands for, of either kind of tokenizer."""
    token = tokenizer.hf.convert_ids_to_tokens(i)
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    if tokenizer.hf.convert_tokens_to_ids("Ġw") is not None and "Ġw" in tokenizer.hf.get_vocab():
        from tokenizers.pre_tokenizers import ByteLevel  # the usual table of 256 characters

        table = {
            ByteLevel(add_prefix_space=False).pre_tokenize_str(chr(b))[0][0]: b for b in range(128)
        }
        return bytes(table.get(c, 255) for c in token)
    return token.replace("▁", " ").encode()


def test_ends_of_the_request_count_where_the_form_is_complete(
    tokenizer: Tokenizer, grammars: Grammars
) -> None:
    structure = StructuredOutputsParams(regex="a+")
    a = tokenizer.hf.convert_tokens_to_ids("a")
    for end_ids in ([EOS], [EOS, 2], [2], []):
        m = grammars.matcher(structure, end_ids)
        assert not m.allowed()[:3].any()
        m.accept(a)
        assert m.allowed()[:3].nonzero()[0].tolist() == sorted(end_ids)


def test_text_ends_with_its_form_even_if_ends_are_ignored(tokenizer: Tokenizer) -> None:
    structure = StructuredOutputsParams(regex="ab")
    for params in ({"ignore_eos": True}, {}, {"min_tokens": 9}):
        r = write(tokenizer, structure, 1, **params)
        assert (r.text, r.finish_reason, EOS in r.ids) == ("ab", "stop", False)


def test_min_tokens_and_stop_strings_work_with_it(tokenizer: Tokenizer) -> None:
    r = write(tokenizer, StructuredOutputsParams(regex="c{1,30}"), 1, min_tokens=12)
    assert len(r.token_ids) >= 12
    r = write(tokenizer, StructuredOutputsParams(regex="c{5,30}"), 1, stop="ccc")
    assert (r.text, r.stop_reason) == ("", "ccc")


def test_bad_words_give_way_where_the_form_needs_them(tokenizer: Tokenizer) -> None:
    r = write(tokenizer, StructuredOutputsParams(regex="cd"), 1, bad_words=["c"])
    assert r.text == "cd"


def test_compiled_once_and_the_oldest_forgotten(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = Grammars(tokenizer, len(tokenizer), cached=2)
    compiled: list[str] = []
    compile_ = g._compile
    monkeypatch.setattr(g, "_compile", lambda kind, t: compiled.append(t) or compile_(kind, t))
    held = g.compile(StructuredOutputsParams(regex="held"))
    for pattern in ("a", "b", "a", "c", "a", "b"):
        g.matcher(StructuredOutputsParams(regex=pattern))
    assert compiled == ["held", "a", "b", "c", "b"]
    g.matcher(StructuredOutputsParams(regex="held"))  # not forgotten while someone holds it
    assert g.find(StructuredOutputsParams(regex="held")) is held
    assert len(compiled) == 5
    first = g.matcher(StructuredOutputsParams(json=PERSON))
    g.matcher(StructuredOutputsParams(json=json.dumps(PERSON, indent=3)))
    assert len(compiled) == 6
    # Matchers of one grammar go their own ways.
    first.accept(tokenizer.encode("{", special=False)[-1])
    assert g.matcher(StructuredOutputsParams(json=PERSON)).allowed().sum() == 1


def test_what_takes_much_memory_is_forgotten_sooner(tokenizer: Tokenizer) -> None:
    large = [StructuredOutputsParams(regex=f"(a{{{i}}}){{1000}}") for i in (1000, 1001)]
    small = StructuredOutputsParams(regex="ab")
    g = Grammars(tokenizer, len(tokenizer), cached_bytes=100 << 20)
    assert 20 << 20 < g.compile(large[0]).nbytes < 100 << 20
    assert g.compile(small).nbytes < 20 << 20
    assert g.find(large[0]) is not None
    g.compile(large[1])
    assert [g.find(each) is not None for each in (*large, small)] == [False, True, False]


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


BOMBS: dict[str, dict[str, Any]] = {
    "too long": {"regex": "a" * (300 << 10)},
    "too deep": {"json": nested(200)},
    "product": {
        "json": {
            "allOf": [
                {"anyOf": [{"properties": {f"a{k}": {"type": "string"}}} for k in range(10)]}
                for _ in range(6)
            ]
        }
    },
    "loop": {"json": {"$defs": {"n": {"$ref": "#/$defs/n"}}, "$ref": "#/$defs/n"}},
    "no end": {"json": {"type": "integer", "multipleOf": 123456789}},
    "too many": {
        "json": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(9000)}}
    },
    "the stack": {
        "grammar": "start: r0\n"
        + "".join(f"r{i}: r{i + 1} r{i + 1}\n" for i in range(3000))
        + 'r3000: "a"'
    },
    "no text": {"regex": r"[^\s\S]"},
    "from the network": {"json": {"$ref": "http://example.com/schema.json"}},
    "not a type": {"json": {"type": "foo"}},
    "regex": {"regex": "(a"},
    "look-ahead": {"regex": "(?=a)b"},
    "gbnf": {"grammar": "root ::= ("},
    "lark": {"grammar": "start: ("},
    "no start": {"grammar": 'begin ::= "a"'},
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_cannot_be_followed_is_refused(grammars: Grammars, name: str) -> None:
    """Soon, and without this process taking part in it."""
    start, used, memory = time.monotonic(), time.process_time(), _resident()
    with pytest.raises(RequestError, match=r"^structured_outputs: "):
        grammars.matcher(StructuredOutputsParams(**BOMBS[name]))
    assert time.process_time() - used < 2
    assert time.monotonic() - start < 60
    assert _resident() - memory < 64 << 20
    assert grammars.matcher(StructuredOutputsParams(regex="ab")).allowed().sum() == 1


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)


@pytest.mark.parametrize(
    "pattern", ["(a|b)*a(a|b){30}c", "([a-z]{1,60000}x){50}", "((a{1,1000}){1,1000}){1,1000}"]
)
def test_large_patterns_are_followed_step_by_step(
    tokenizer: Tokenizer, grammars: Grammars, pattern: str
) -> None:
    a = tokenizer.hf.convert_tokens_to_ids("a")
    m = grammars.matcher(StructuredOutputsParams(regex=pattern), [EOS])
    start = time.process_time()
    for _ in range(50):
        assert m.allowed()[a] or m.error
        m.accept(a)
    assert time.process_time() - start < 20


def test_failure_on_the_way_ends_that_request_alone(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(tokenizer) + PADDING
    params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a+"))
    requests = [
        Request([5], p, max_length=9, eos_ids=(EOS,), tokenizer=tokenizer)
        for p in (params, SamplingParams())
    ]
    sampler = Sampler(size, tokenizer)

    def fail(self: StructureMatcher, row: torch.Tensor) -> None:
        self.error = "it was too much"

    monkeypatch.setattr(StructureMatcher, "mask", fail)
    failed, went_on = choose(sampler, requests, torch.randn(2, size))
    assert (len(failed.token_ids), len(went_on.token_ids)) == (0, 1)
    output = requests[0].output()
    assert (output.finish_reason, output.error, output.token_ids) == (
        "abort",
        "it was too much",
        [],
    )
    assert requests[1].finish_reason is None


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"regex": "a", "grammar": "b"},
        {"regex": ""},
        {"choice": []},
        {"choice": "ab"},
        {"choice": [1]},
        {"json": "{"},
        {"json": "[1]"},
        {"json": {"a": math.nan}},
        {"json": {"a": object()}},
        {"json": "[" * 100_000},
        {"json_object": False},
    ],
)
def test_structures_that_are_none(given: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        StructuredOutputsParams(**given)


def test_needs_a_tokenizer() -> None:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"))
    with pytest.raises(RequestError, match="tokenizer"):
        Sampler(9).admit(Request([1], params, max_length=9), torch.device("cpu"))


def test_package_that_is_missing_is_named(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(RequestError, match="pip install llguidance"):
        Grammars(tokenizer, 9)


def test_bundled_tokenizer_spells_json() -> None:
    tokenizer = Tokenizer.load(Path(__file__).parents[2] / "examples" / "books-llama")
    g = Grammars(tokenizer, len(tokenizer))
    m = g.matcher(StructuredOutputsParams(json=PERSON), tokenizer.eos_ids)
    text = '{"name": "Zoé", "age": 7, "kind": null, "tags": [true]}'
    ids = tokenizer.encode(text, special=False)
    for i in ids:
        assert m.allowed()[i]
        done = m.accept(i)
    assert done
    assert m.error is None
