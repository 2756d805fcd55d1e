"""/v1/responses: one answer, the events of a stream in their order, refusals."""

import json
from typing import Any

import pytest

from helpers.serving import Client

pytestmark = pytest.mark.asyncio(loop_scope="module")
PATH = "/v1/responses"
BODY: dict[str, Any] = {"input": "hello", "temperature": 0, "max_output_tokens": 6}


async def test_text_and_messages_are_conversations(app: Client) -> None:
    got = (await app.post(PATH, BODY)).json()
    assert got["object"] == "response"
    assert got["status"] in ("incomplete", "completed")
    text = got["output"][0]["content"][0]["text"]
    chat = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 6}
    same = (await app.post("/v1/chat/completions", chat)).json()
    assert text == same["choices"][0]["message"]["content"]
    assert got["usage"]["input_tokens"] == same["usage"]["prompt_tokens"]
    parts = [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}]
    again = (await app.post(PATH, {**BODY, "input": parts})).json()
    assert again["output"][0]["content"] == got["output"][0]["content"]
    more = (await app.post(PATH, {**BODY, "instructions": "be brief"})).json()
    assert more["usage"]["input_tokens"] > got["usage"]["input_tokens"]
    assert more["instructions"] == "be brief"


async def test_stream(app: Client) -> None:
    whole = (await app.post(PATH, BODY)).json()
    answer = await app.post(PATH, {**BODY, "stream": True})
    blocks = [block.split("\n") for block in answer.text.strip().split("\n\n")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in blocks]
    assert [name.removeprefix("event: ") for name, _ in blocks] == [e["type"] for e in events]
    assert [e["sequence_number"] for e in events] == list(range(len(events)))
    kinds = [e["type"].removeprefix("response.") for e in events]
    deltas = kinds.count("output_text.delta")
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * deltas,
        *("output_text.done", "content_part.done", "output_item.done", whole["status"]),
    ]
    text = "".join(e["delta"] for e in events if e["type"].endswith("text.delta"))
    assert text == whole["output"][0]["content"][0]["text"]
    assert events[-1]["response"]["usage"] == whole["usage"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"input": []}, "empty"),
        ({"input": [{"type": "function_call_output"}]}, "function_call_output"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input_image"),
        ({"input": [{"content": "a"}]}, "role"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"text": {"format": {"type": "xml"}}}, "response_format"),
        ({"max_output_tokens": 1000}, "max_output_tokens"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"top_logprobs": 2}, "logprobs"),
        ({"seed": 2**70}, "seed"),
    ],
)
async def test_refusals(app: Client, change: dict[str, Any], says: str) -> None:
    got = await app.post(PATH, {**BODY, **change})
    assert got.status_code == 400, got.text
    assert says in got.json()["error"]["message"]


async def test_text_in_the_form_that_was_asked(app: Client) -> None:
    form = {"type": "json_schema", "name": "word", "schema": {"enum": ["ab"]}}
    got = (await app.post(PATH, {**BODY, "text": {"format": form}, "max_output_tokens": 30})).json()
    assert got["status"] == "completed"
    assert got["output"][0]["content"][0]["text"] == '"ab"'
    assert got["text"] == {"format": form}
    plain = (await app.post(PATH, {**BODY, "text": {"verbosity": "low"}})).json()
    assert plain["text"] == {"format": {"type": "text"}, "verbosity": "low"}
