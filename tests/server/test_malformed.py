"""Bodies that are no requests get a 4xx in OpenAI's shape, never a 500."""

import json
import time
from typing import Any

import pytest

from helpers.serving import Client

pytestmark = pytest.mark.asyncio(loop_scope="module")
ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize")
MESSAGES = [{"role": "user", "content": "a"}]
VALID: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a", "max_tokens": 1},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 1},
    "/v1/responses": {"input": "a", "max_output_tokens": 1},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [5]},
}
BODIES = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"3",
    b'"text"',
    b"\xff\xfe{}",
    b'{"prompt": "\xc3\x28", "messages": "\xff", "input": "\xff", "tokens": "\xff"}',
    b'{"seed": ' + b"9" * 5000 + b"}",
    b"[" * 100_000,
    b'{"prompt": ' + b"[" * 3000 + b"]" * 3000 + b"}",
    b'{"prompt": "\\ud800", "messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"prompt": [1e400], "tokens": [1.5], "input": 7, "messages": {}}',
]


def check_error(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    return dict(error)


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("body", BODIES, ids=lambda b: repr(b[:24]))
async def test_bodies_that_are_no_requests(app: Client, path: str, body: bytes) -> None:
    check_error(await app.send(path, body), 400)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"prompt": "\xc3\x28"}', "UTF-8"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "deep"),
        (b"{", "not valid JSON"),
    ],
)
async def test_bodies_that_are_no_json_are_told_why(app: Client, body: bytes, says: str) -> None:
    error = check_error(await app.send(ROUTES[0], body), 400)
    assert says in error["message"]
    assert error["code"] == "invalid_json"


@pytest.mark.parametrize("path", ROUTES[:3])
@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p"])
@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
async def test_numbers_that_are_none(app: Client, path: str, field: str, number: str) -> None:
    body = json.dumps({**VALID[path], field: float(number)}).encode()
    assert check_error(await app.send(path, body), 400)["param"] == field


NUMBERS = {
    "temperature": [-1, 1e400, "hot"],
    "top_p": [0, 1.5, -1, 10**400],
    "min_p": [-0.1, 2],
    "top_k": [-2, 1.5, -(10**30)],
    "seed": [2**63, -(2**63) - 1, 10**300, 1.5],
    "n": [0, -1, 10**30, 129],
}
SOME = {
    "max_tokens": [0, -1, 10**30, 1.5],
    "min_tokens": [-1, 10**30],
    "presence_penalty": [-3, 3, 1e308],
    "frequency_penalty": [-3, 3],
    "repetition_penalty": [0, -1, 1e9],
    "priority": [10**30],
    "truncate_prompt_tokens": [-2, 10**30],
    "stop_token_ids": [[-1], [10**9], [2**70], [True], [1.5], ["a"], 5],
    "allowed_token_ids": [[-1], [10**9], [2**70], [False], {}],
    "logit_bias": [{"a": 1}, {"-1": 1}, {"5": 101}, {"99999": 1}, {"5": True}, {"5": None}, [1]],
    "bad_words": [[""], [5], "a"],
    "stop": [[""], [5], {}],
    "guided_regex": ["(", 5, ""],
    "guided_choice": [[], [5], "ab"],
    "structured_outputs": [{"regex": "a", "json": {}}, {"x": 1}, "a"],
    "response_format": [{"type": "xml"}, {"type": "json_schema"}, {"type": ["text"]}, 5],
    "stream_options": [{"include_usage": "perhaps"}, {}, 5],
}


def wrong_values() -> list[tuple[str, str, Any]]:
    texts, chat, responses = ROUTES[:3]
    found = [(path, *pair) for path in ROUTES[:3] for pair in NUMBERS.items()]
    found += [(path, *pair) for path in (texts, chat) for pair in SOME.items()]
    found += [
        (texts, "prompt", [[-1], [2**70], [True], [[5], [10**9]], [[5], []], ["a", 5], [], {}]),
        (texts, "logprobs", [-1, 21, 10**30]),
        (texts, "prompt_logprobs", [-1, 21]),
        (chat, "top_logprobs", [-1, 21, 3]),
        (chat, "max_completion_tokens", [0, -1, 10**30]),
        (chat, "messages", [[], [5], [{}], [{"role": 5, "content": "a"}], "a"]),
        (responses, "max_output_tokens", [0, -1, 10**30]),
        (responses, "input", [5, [], [5], [{"role": "user", "content": 5}]]),
        ("/detokenize", "tokens", [[-1], [2**70], [True], [1.5], "a", 5]),
        ("/tokenize", "prompt", [5, ["a"]]),
    ]
    return [(path, field, value) for path, field, values in found for value in values]


@pytest.mark.parametrize(("path", "field", "value"), wrong_values())
async def test_values_out_of_range(app: Client, path: str, field: str, value: Any) -> None:
    check_error(await app.post(path, {**VALID[path], field: value}), 400)


@pytest.mark.parametrize("path", ROUTES)
async def test_true_is_no_number(app: Client, path: str) -> None:
    names = [*NUMBERS, "prompt", "tokens", "messages", "input"]
    names += [] if path == ROUTES[2] else ["max_tokens", "min_tokens", "presence_penalty"]
    known = (await app.get("/openapi.json")).json()
    content = known["paths"][path]["post"]["requestBody"]["content"]
    name = content["application/json"]["schema"]["$ref"].rpartition("/")[2]
    fields = known["components"]["schemas"][name]["properties"]
    asked = [name for name in names if name in fields]
    assert asked
    for name in asked:
        error = check_error(await app.post(path, {**VALID[path], name: True}), 400)
        assert error["param"] == name


MANY: dict[str, tuple[str, dict[str, Any]]] = {
    "prompts": (ROUTES[0], {"prompt": ["a"] * 200_000}),
    "wrong prompts": (ROUTES[0], {"prompt": ["a"] * 200_000 + [5]}),
    "ids": (ROUTES[0], {"prompt": [5] * 1_000_000}),
    "wrong ids": (ROUTES[0], {"prompt": [1.5] * 1_000_000}),
    "messages": (ROUTES[1], {"messages": [5] * 1_000_000}),
    "stop strings": (ROUTES[0], {"prompt": "a", "stop": [5] * 1_000_000}),
    "biases": (ROUTES[0], {"prompt": "a", "logit_bias": {str(i): "x" for i in range(300_000)}}),
    "words": (ROUTES[0], {"prompt": "a", "allowed_token_ids": [-1] * 1_000_000}),
}


@pytest.mark.parametrize("name", MANY)
async def test_a_million_of_anything_is_refused_soon(app: Client, name: str) -> None:
    """Nobody else is served while a body is looked at, so that must be over soon."""
    path, body = MANY[name]
    raw = json.dumps(body).encode()
    start = time.process_time()
    check_error(await app.send(path, raw), 400)
    assert time.process_time() - start < 2


async def test_bodies_of_10_mb(app: Client) -> None:
    for path in ROUTES[:4]:
        text = "word " * 2_000_000
        talk = [{"role": "user", "content": text}]
        body = {**VALID[path], "prompt": text, "messages": talk, "input": text}
        check_error(await app.post(path, body), 413)


@pytest.mark.parametrize("path", ROUTES)
async def test_lone_surrogates_anywhere(app: Client, path: str) -> None:
    """They are valid JSON escapes and no text; fields we only pass on may hold them."""
    got = await app.post(path, {**VALID[path], "user": "\ud800"})
    assert got.status_code in (200, 400)
    talk = [{"role": "user", "content": "a", "name": "\udfff"}]
    got = await app.post(
        path, {**VALID[path], "messages": talk, "chat_template_kwargs": {"x": "\ud800"}}
    )
    assert got.status_code in (200, 400)


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
async def test_content_type(app: Client, path: str, kind: str | None) -> None:
    body = json.dumps(VALID[path]).encode()
    error = check_error(await app.send(path, body, kind), 415)
    assert "application/json" in error["message"]
    assert (await app.send(path, body, "application/json; charset=utf-8")).status_code == 200


async def test_routes_and_methods_that_do_not_exist(app: Client) -> None:
    assert check_error(await app.get("/v1/nothing"), 404)["type"] == "not_found_error"
    check_error(await app.get("/v1/completions"), 405)
    check_error(await app.get("/v1/models/nothing"), 404)
    check_error(await app.post("/v1/chat/completions", {**VALID[ROUTES[1]], "model": "x"}), 404)


async def test_tokenize_and_back(app: Client) -> None:
    got = (await app.post("/tokenize", {"prompt": "hello w", "return_token_strs": True})).json()
    assert got["count"] == len(got["tokens"]) == len(got["token_strs"])
    assert got["max_model_len"] == 128
    back = (await app.post("/detokenize", {"tokens": got["tokens"]})).json()
    assert back == {"prompt": "hello w"}
    talk = (await app.post("/tokenize", {"messages": MESSAGES})).json()
    text = (await app.post("/detokenize", {"tokens": talk["tokens"]})).json()["prompt"]
    assert text == "<|bos|>[user] a\n[assistant] "
    check_error(await app.post("/tokenize", {}), 400)
    check_error(await app.post("/tokenize", {"prompt": "a", "messages": MESSAGES}), 400)
    check_error(await app.post("/detokenize", {"tokens": [10**9]}), 400)
    check_error(await app.post("/detokenize", {"tokens": [-1]}), 400)
    assert (await app.post("/detokenize", {"tokens": []})).json() == {"prompt": ""}
    info = (await app.get("/tokenizer_info")).json()
    assert info["bos_token"] == "<|bos|>"
    assert info["eos_token_ids"] == [1]
    assert "assistant" in info["chat_template"]


async def test_models_and_health(app: Client) -> None:
    models = (await app.get("/v1/models")).json()
    assert [m["id"] for m in models["data"]] == ["tiny", "alias"]
    assert (await app.get("/v1/models/alias")).json()["max_model_len"] == 128
    for path in ("/health", "/ping", "/version", "/docs", "/openapi.json", "/metrics"):
        assert (await app.get(path)).status_code == 200, path
    assert (await app.http.post("/ping")).status_code == 200
