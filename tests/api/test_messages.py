"""Messages and tools as chat templates expect them."""

from typing import Any

import pytest

from qoq.api.messages import plain_messages, shown_tools
from qoq.api.protocol import Message
from qoq.errors import RequestError

CALLS = [
    {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
    {"id": "b", "function": {"name": "g", "arguments": '{"x'}},
]


def plain(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    return plain_messages([Message.of_json(message) for message in messages])


def test_content_is_text() -> None:
    parts = [{"type": "text", "text": "a"}, "b", {"type": "input_text", "text": "c"}]
    [message] = plain({"role": "user", "content": parts, "name": "me", "extra": [1]})
    assert message == {"role": "user", "content": "a\nb\nc", "name": "me", "extra": [1]}
    assert plain({"role": "assistant", "content": None, "tool_calls": []}) == [
        {"role": "assistant"}
    ]
    with pytest.raises(RequestError, match="image_url") as caught:
        plain({"role": "user", "content": [{"type": "image_url"}]})
    assert caught.value.param == "messages"


def test_calls_and_what_came_of_them() -> None:
    said, second, first, named, lost = plain(
        {"role": "assistant", "tool_calls": CALLS},
        {"role": "tool", "tool_call_id": "b", "content": "2"},
        {"role": "tool", "tool_call_id": "a", "content": "1"},
        {"role": "tool", "tool_call_id": "a", "content": "1", "name": "other"},
        {"role": "tool", "tool_call_id": "c", "content": "3"},
    )
    assert said["tool_calls"][0] == {**CALLS[0], "function": {"name": "f", "arguments": {"x": 1}}}
    assert said["tool_calls"][1]["function"]["arguments"] == '{"x'
    assert [m.get("name") for m in (second, first, named, lost)] == ["g", "f", "other", None]


@pytest.mark.parametrize(
    "message",
    [
        {"content": "a"},
        {"role": "assistant", "tool_calls": [{}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]},
        {"role": "assistant", "tool_calls": [{"type": "custom", "function": {"name": "f"}}]},
    ],
)
def test_messages_that_are_none(message: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        plain(message)


def test_tools() -> None:
    empty = {"type": "object", "properties": {}}
    given = {"name": "f", "strict": True, "description": None, "parameters": None}
    assert shown_tools([{"type": "function", "function": given}]) == [
        {"type": "function", "function": {"name": "f", "parameters": empty}}
    ]
    assert given["strict"] is True
    full = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
    assert shown_tools([full]) == [full]
    assert shown_tools([]) is shown_tools(None) is None
