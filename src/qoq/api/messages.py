"""Conversations as chat templates expect them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qoq.api.protocol import Message, MessageCall, TextPart
from qoq.errors import RequestError

_TEXT_PARTS = ("text", "input_text", "output_text")


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as templates expect them: content is a string, and arguments of calls are objects.

    Text parts are joined by newlines. Arguments that are no object's JSON stay the text they are:
    an answer may have been cut off within them. Some templates want a result to name its function,
    which clients do not: the call that it belongs to does. Raises RequestError for what is no text.
    """
    plain = [_plain(message) for message in messages]
    called: dict[str, str] = {}
    for message in plain:
        for call in message.get("tool_calls", ()):
            called[call.get("id", "")] = call["function"]["name"]
        key = message.get("tool_call_id")
        if message["role"] == "tool" and key in called:
            message.setdefault("name", called[key])
    return plain


def _plain(message: Message) -> dict[str, Any]:
    plain: dict[str, Any] = {"role": message.role, **(message.model_extra or {})}
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        plain["tool_calls"] = [_plain_call(call) for call in message.tool_calls]
    if isinstance(message.content, list):
        plain["content"] = "\n".join(_part_text(part) for part in message.content)
    elif message.content is not None:
        plain["content"] = message.content
    return plain


def _plain_call(call: MessageCall) -> dict[str, Any]:
    arguments: Any = call.function.arguments or {}
    if isinstance(arguments, str):
        try:
            value = json.loads(arguments)
        except (ValueError, RecursionError):
            value = None
        arguments = value if isinstance(value, dict) else arguments
    plain: dict[str, Any] = {} if call.id is None else {"id": call.id}
    plain["type"] = call.type
    return {**plain, "function": {"name": call.function.name, "arguments": arguments}}


def shown_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Tools as the model is shown them: how strictly they are called is not its business.

    What is left out or null is left out, but for parameters: templates go through them.
    """
    if not tools:
        return None
    shown = []
    for tool in tools:
        function = tool.get("function")
        if isinstance(function, Mapping):
            kept = {k: v for k, v in function.items() if k != "strict" and v is not None}
            kept.setdefault("parameters", {"type": "object", "properties": {}})
            tool = {**tool, "function": kept}
        shown.append(dict(tool))
    return shown


def _part_text(part: TextPart | str) -> str:
    if isinstance(part, str):
        return part
    if part.type not in _TEXT_PARTS:
        raise RequestError(
            f"Content of type {part.type[:40]!r} is not supported; this model reads text only.",
            param="messages",
        )
    return part.text or ""
