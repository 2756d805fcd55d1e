"""/v1/chat/completions: templates, parts, streams, logprobs, refusals."""

import json
from typing import Any

import pytest

from helpers.serving import Client
from qoq import LLM, SamplingParams
from qoq.server.model import ServedModel

pytestmark = pytest.mark.asyncio(loop_scope="module")
PATH = "/v1/chat/completions"
TALK = [{"role": "user", "content": "hello"}]
BODY: dict[str, Any] = {"messages": TALK, "temperature": 0, "max_tokens": 8, "ignore_eos": True}


async def test_answer_is_what_the_offline_door_gives(app: Client, model: ServedModel) -> None:
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    wanted = LLM(model.path).chat(TALK, params)[0]
    got = (await app.post(PATH, BODY)).json()
    assert got["choices"][0]["message"] == {
        "role": "assistant",
        "content": wanted.text,
        "refusal": None,
    }
    assert got["usage"]["prompt_tokens"] == len(wanted.prompt_token_ids)
    assert got["object"] == "chat.completion"
    chunks = await app.events(PATH, {**BODY, "stream_options": {"include_usage": True}})
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1])
    assert text == wanted.text
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == got["usage"]


async def test_content_in_parts_is_joined(app: Client) -> None:
    parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": "you"}]
    got = await app.post(PATH, {**BODY, "messages": [{"role": "user", "content": parts}]})
    text = {**BODY, "messages": [{"role": "user", "content": "hello\nyou"}]}
    same = await app.post(PATH, text)
    assert got.json()["choices"] == same.json()["choices"]


async def test_length_defaults_to_the_rest_of_the_context(app: Client) -> None:
    body = {key: value for key, value in BODY.items() if key != "max_tokens"}
    got = (await app.post(PATH, body)).json()
    assert got["usage"]["total_tokens"] == 128
    body["max_completion_tokens"] = 3
    assert (await app.post(PATH, body)).json()["usage"]["completion_tokens"] == 3


async def test_logprobs(app: Client) -> None:
    got = (await app.post(PATH, {**BODY, "logprobs": True})).json()["choices"][0]["logprobs"]
    assert len(got["content"]) == 8
    for entry in got["content"]:
        assert set(entry) == {"token", "logprob", "bytes", "top_logprobs"}
        assert bytes(entry["bytes"]).decode() == entry["token"]
    chunks = await app.events(PATH, {**BODY, "logprobs": True})
    streamed = [e for c in chunks for e in (c["choices"][0]["logprobs"] or {}).get("content", [])]
    assert streamed == got["content"]


async def test_answer_can_go_on_with_the_last_message(app: Client, model: ServedModel) -> None:
    talk = [*TALK, {"role": "assistant", "content": "he"}]
    body = {**BODY, "messages": talk, "continue_final_message": True}
    assert (await app.post(PATH, body)).status_code == 400
    got = (await app.post(PATH, {**body, "add_generation_prompt": False})).json()
    text = "<|bos|>[user] hello\n[assistant] he"
    ids = model.tokenizer.encode(text, special=False)
    assert got["usage"]["prompt_tokens"] == len(ids)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"content": "a"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
        ({"messages": [{"role": "user", "content": "w" * 500}]}, "context is 128"),
        ({"messages": [{"role": "user", "content": "a", "x": "\ud800"}], "max_tokens": 1}, ""),
        ({"top_logprobs": 3}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "20"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"messages": []}}, "messages"),
        ({"echo": True}, "echo"),
        ({"max_completion_tokens": 1000}, "max_completion_tokens"),
    ],
)
async def test_refusals(app: Client, change: dict[str, Any], says: str) -> None:
    got = await app.post(PATH, {**BODY, **change})
    assert got.status_code == (400 if says else 200), got.text
    if says:
        assert says in got.json()["error"]["message"]


async def test_harmless_fields_pass(app: Client) -> None:
    harmless = {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}}
    assert (await app.post(PATH, {**BODY, **harmless, "parallel_tool_calls": True})).is_success


async def test_the_likeliest_tokens_are_told(app: Client) -> None:
    got = await app.post(PATH, {**BODY, "logprobs": True, "top_logprobs": 2, "temperature": 0})
    content = got.json()["choices"][0]["logprobs"]["content"]
    assert content
    for entry in content:
        values = [top["logprob"] for top in entry["top_logprobs"]]
        assert len(values) == 2
        assert values == sorted(values, reverse=True)
        assert entry["logprob"] == values[0]  # greedy


async def test_answers_in_json(app: Client) -> None:
    form = {"type": "json_schema", "json_schema": {"schema": {"enum": ["ab"]}}}
    got = await app.post(PATH, {**BODY, "response_format": form, "max_tokens": 40})
    assert json.loads(got.json()["choices"][0]["message"]["content"]) == "ab"
