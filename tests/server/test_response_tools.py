"""Functions in /v1/responses: calls as items, their events, and items that come back."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from helpers import serving
from helpers.calling import TOOLS, WEATHER, led_to, obeys
from helpers.serving import Client
from qoq.server.model import ServedModel

pytestmark = pytest.mark.asyncio(loop_scope="module")
PATH = "/v1/responses"
FUNCTIONS = [{"type": "function", **tool["function"]} for tool in TOOLS]
BODY: dict[str, Any] = {
    "input": "hello",
    "tools": FUNCTIONS,
    "max_output_tokens": 300,
    "seed": 1,
}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Köln"}}</tool_call>'
NOW = '<tool_call>{"name": "now"}</tool_call>'
ARGUMENTS = '{"city": "Köln"}'


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def app(caller: ServedModel) -> AsyncIterator[Client]:
    async with serving.client(caller) as client:
        yield client


async def ask(app: Client, **body: Any) -> dict[str, Any]:
    got = await app.post(PATH, {**BODY, **body})
    assert got.status_code == 200, got.text
    value = got.json()
    assert isinstance(value, dict)
    return value


async def events(app: Client, **body: Any) -> list[dict[str, Any]]:
    answer = await app.post(PATH, {**BODY, **body, "stream": True})
    assert answer.status_code == 200, answer.text
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line[:6] == "data: "]


def seen(items: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Items without their ids."""
    return [
        (item["name"], item["arguments"], item["status"])
        if item["type"] == "function_call"
        else (item["content"][0]["text"], item["status"])
        for item in items
    ]


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("Words.", [("Words.", "completed")]),
        (CALL, [("weather", ARGUMENTS, "completed")]),
        (
            f"Hm. {CALL}\n{NOW}",
            [
                ("Hm.", "completed"),
                ("weather", ARGUMENTS, "completed"),
                ("now", "{}", "completed"),
            ],
        ),
        (f"{CALL} Done.", [("weather", ARGUMENTS, "completed"), ("Done.", "completed")]),
    ],
)
async def test_items(app: Client, text: str, items: list[tuple[str, ...]]) -> None:
    led = led_to(text, app.context.model.tokenizer)
    got = await ask(app, **led)
    assert got["status"] == "completed"
    assert seen(got["output"]) == items
    assert got["tools"] == FUNCTIONS
    told = await events(app, **led)
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    whole = told[-1]["response"]
    assert told[-1]["type"] == "response.completed"
    assert seen(whole["output"]) == items
    assert len({item["id"] for item in whole["output"]}) == len(items)
    check_events(told[2:-1], whole["output"])


def check_events(told: list[dict[str, Any]], output: list[dict[str, Any]]) -> None:
    """Each item is added, grows and is done before the next one begins."""
    for index, item in enumerate(output):
        own = [event for event in told if event["output_index"] == index]
        assert told[: len(own)] == own
        told = told[len(own) :]
        kinds = [event["type"].removeprefix("response.") for event in own]
        deltas = "".join(event.get("delta", "") for event in own)
        ids = {event["item_id"] for event in own if "item_id" in event}
        assert ids == {item["id"]}
        assert own[0]["item"]["status"] == "in_progress"
        assert own[-1]["item"] == item
        if item["type"] == "function_call":
            count = kinds.count("function_call_arguments.delta")
            assert kinds == [
                "output_item.added",
                *["function_call_arguments.delta"] * count,
                *("function_call_arguments.done", "output_item.done"),
            ]
            assert own[0]["item"]["arguments"] == ""
            assert own[0]["item"]["call_id"] == item["call_id"]
            assert deltas == own[-2]["arguments"] == item["arguments"]
        else:
            assert kinds[:2] == ["output_item.added", "content_part.added"]
            assert kinds[-3:] == ["output_text.done", "content_part.done", "output_item.done"]
            assert deltas == own[-3]["text"] == item["content"][0]["text"]
    assert told == []


async def test_a_call_that_is_cut_off(app: Client) -> None:
    led = led_to(CALL, app.context.model.tokenizer)
    got = await ask(app, **led, max_output_tokens=41)
    assert got["status"] == "incomplete"
    [(name, arguments, status)] = seen(got["output"])
    assert (name, status) == ("weather", "incomplete")
    assert ARGUMENTS.startswith(arguments)
    assert (await events(app, **led, max_output_tokens=41))[-1]["type"] == "response.incomplete"


async def test_a_function_that_is_named(app: Client) -> None:
    choice = {"type": "function", "name": "weather"}
    got = await ask(app, tool_choice=choice, temperature=1.0)
    [item] = got["output"]
    assert (item["type"], item["name"]) == ("function_call", "weather")
    assert obeys(item["arguments"])
    assert (got["tool_choice"], got["parallel_tool_calls"]) == (choice, True)
    strict = [{**FUNCTIONS[0], "strict": True}]
    got = await ask(app, tools=strict, tool_choice="required", parallel_tool_calls=False)
    assert [obeys(item["arguments"]) for item in got["output"]] == [True]
    assert got["parallel_tool_calls"] is False


async def test_items_come_back(app: Client) -> None:
    """They are the same conversation as in chat completions."""
    led = led_to(f"Hm. {CALL}{NOW}", app.context.model.tokenizer)
    output = (await ask(app, **led))["output"]
    told: list[Any] = ["rain", [{"type": "input_text", "text": "noon"}]]
    results = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": text}
        for item, text in zip(output[1:], told, strict=True)
    ]
    user = {"role": "user", "content": "hello"}
    got = await ask(app, input=[user, *output, *results], max_output_tokens=1)
    calls = [
        {
            "id": item["call_id"],
            "type": "function",
            "function": {"name": item["name"], "arguments": item["arguments"]},
        }
        for item in output[1:]
    ]
    talk = [
        user,
        {"role": "assistant", "content": "Hm.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": calls[0]["id"], "content": "rain"},
        {"role": "tool", "tool_call_id": calls[1]["id"], "content": "noon"},
    ]
    chat = {"messages": talk, "tools": TOOLS}
    tokens = (await app.post("/tokenize", chat)).json()
    assert got["usage"]["input_tokens"] == tokens["count"]
    again = await ask(app, input=[user, *output, *results], max_output_tokens=1)
    assert again["usage"]["input_tokens_details"]["cached_tokens"] > 0
    same = await app.post("/v1/chat/completions", {**chat, "max_tokens": 1})
    assert same.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools", "web_search"),
        ({"tools": [{"name": "f"}]}, "tools", "only functions"),
        ({"tools": [{"type": "function", "parameters": WEATHER}]}, "tools", "name"),
        ({"tools": FUNCTIONS * 2}, "tools", "'weather'"),
        ({"tool_choice": {"type": "function", "name": "moon"}}, "tool_choice", "'moon'"),
        ({"tool_choice": {"type": "allowed_tools", "tools": []}}, "tool_choice", "must be"),
        ({"tool_choice": "required", "tools": []}, "tool_choice", "empty"),
        (
            {
                "tool_choice": "required",
                "tools": [{"type": "function", "name": "f", "parameters": {"type": "foo"}}],
            },
            "tools",
            "foo",
        ),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input", "call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "a"}]}, "input", "output"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input", "item_reference"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_refusals(
    app: Client, change: dict[str, Any], param: str, says: str, stream: bool
) -> None:
    got = await app.post(PATH, {**BODY, **change, "stream": stream})
    assert got.status_code == 400, got.text
    assert got.json()["error"]["param"] == param
    assert says in got.json()["error"]["message"]
