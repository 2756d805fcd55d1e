"""Lines of the batch format: what is refused, and how the rest is understood."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qoq.batch.lines import (
    CHAT,
    COMPLETIONS,
    BadLine,
    Line,
    line_id,
    malformed,
    params_of,
    prompt_ids,
    read_line,
    refusal,
)
from qoq.engine.request import SamplingParams
from qoq.errors import RequestError


def line(url: str = COMPLETIONS, **body: Any) -> Line:
    return Line("batch_req_1", "a", url, body)


GOOD = {"custom_id": "a", "method": "POST", "url": CHAT, "body": {}}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"custom_id": None}, None),
        ({"custom_id": 3}, None),
        ({"method": "GET"}, "a"),
        ({"url": "/v1/embeddings"}, "a"),
        ({"body": []}, "a"),
    ],
)
def test_bad_lines_are_named(change: dict[str, Any], named: str | None) -> None:
    with pytest.raises(BadLine, match="Line 7") as caught:
        read_line(7, json.dumps({**GOOD, **change}).encode())
    assert caught.value.custom_id == named
    told = malformed("x", caught.value)
    assert (told["id"], told["custom_id"], told["response"]) == ("x", named, None)
    assert "Line 7" in told["error"]["message"]


@given(st.binary(max_size=40))
def test_any_bytes_are_a_line_or_a_bad_one(raw: bytes) -> None:
    with pytest.raises(BadLine):
        read_line(1, raw)


def test_ids_hang_on_place_and_text() -> None:
    assert line_id(1, b"a") == line_id(1, b"a")
    assert len({line_id(1, b"a"), line_id(2, b"a"), line_id(1, b"b")}) == 3


def test_sampling_of_a_line() -> None:
    assert params_of(line(), {}, 99) == SamplingParams(max_tokens=16, temperature=1.0)
    assert params_of(line(CHAT), {"top_k": 4}, 99) == SamplingParams(99, 1.0, 4)
    got = params_of(
        line(
            CHAT,
            temperature=0,
            max_completion_tokens=5,
            max_tokens=7,
            seed=3,
            stop="x",
            top_k=-1,
            n=1,
            stream=False,
            logprobs=None,
            user="me",
            tools=[],
        ),
        {"temperature": 0.6, "top_k": 4},
        99,
    )
    assert got == SamplingParams(5, 0, 0, seed=3, stop="x")


@pytest.mark.parametrize(
    "body",
    [
        {"n": 2},
        {"logprobs": 3},
        {"logit_bias": {"x": 1}},
        {"logit_bias": 3},
        {"structured_outputs": {"regex": "a"}},
        {"tools": [{}]},
        {"response_format": {"type": "json_object"}},
        {"stream": True},
        {"temperature": "hot"},
        {"max_tokens": 0},
        {"max_tokens": "many"},
        {"stop": [3]},
        {"seed": -1},
    ],
)
def test_what_cannot_be_honoured_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        params_of(line(**body), {}, 99)
    told = refusal(line(**body), caught.value)
    assert told["response"]["status_code"] == 400
    assert told["response"]["body"]["error"]["message"] == str(caught.value)


def test_prompts() -> None:
    def encode(text: str) -> list[int]:
        return [len(text)]

    def chat(messages: Any) -> list[int]:
        return [len(m["content"]) for m in messages]

    def ids(one: Line) -> list[int]:
        return prompt_ids(one, encode, chat)

    assert ids(line(prompt="abc")) == [3]
    assert ids(line(prompt=["abcd"])) == [4]
    assert ids(line(prompt=[1, 2])) == [1, 2]
    assert ids(line(prompt=[[1, 2]])) == [1, 2]
    parts = [{"type": "text", "text": "ab"}, {"type": "text", "text": "c"}]
    said = [{"role": "user", "content": parts}, {"role": "assistant", "content": "x"}]
    assert ids(line(CHAT, messages=said)) == [4, 1]
    bad = [
        line(),
        line(prompt=["a", "b"]),
        line(prompt=[1, True]),
        line(prompt=3),
        line(CHAT),
        line(CHAT, messages=[]),
        line(CHAT, messages=["a"]),
        line(CHAT, messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
    ]
    for each in bad:
        with pytest.raises(RequestError):
            ids(each)
