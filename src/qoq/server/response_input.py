"""What clients send to /v1/responses, in the shapes of chat completions."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from qoq.api.protocol import (
    Body,
    CalledFunction,
    Message,
    MessageCall,
    ResponsesRequest,
    TextPart,
)
from qoq.server.errors import bad_request


class _Call(Body):
    """An item of type function_call."""

    call_id: str
    name: str
    arguments: str


class _CallOutput(Body):
    """An item of type function_call_output."""

    call_id: str
    output: str | list[TextPart | str]


def messages_of(body: ResponsesRequest) -> list[Message]:
    """Instructions and input as the messages of a conversation. Raises APIError 400."""
    first = [Message(role="system", content=body.instructions)] if body.instructions else []
    if isinstance(body.input, str):
        return [*first, Message(role="user", content=body.input)]
    return [*first, *_conversation(body.input)]


def tools_of(body: ResponsesRequest) -> list[dict[str, Any]]:
    """The functions, which here are not one level further down. Raises APIError 400."""
    tools = []
    for at, tool in enumerate(body.tools or ()):
        kind = tool.get("type")
        if kind != "function":
            raise bad_request(
                f"tools[{at}]: type {str(kind)[:40]!r} is not supported; only functions are.",
                param="tools",
            )
        function = {key: value for key, value in tool.items() if key != "type"}
        tools.append({"type": "function", "function": function})
    return tools


def choice_of(body: ResponsesRequest) -> str | dict[str, Any] | None:
    """tool_choice, likewise. What it is not is for ``plan_tools`` to say."""
    choice = body.tool_choice
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _conversation(items: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Calls that follow each other, or the text before them, are one message."""
    messages: list[Message] = []
    for at, item in enumerate(items):
        kind = item.get("type", "message")
        try:
            if kind == "function_call":
                made = _Call.model_validate(item)
                function = CalledFunction(name=made.name, arguments=made.arguments)
                call = MessageCall(id=made.call_id, function=function)
                if not messages or messages[-1].role != "assistant":
                    messages.append(Message(role="assistant"))
                messages[-1].tool_calls = [*(messages[-1].tool_calls or ()), call]
            elif kind == "function_call_output":
                told = _CallOutput.model_validate(item)
                messages.append(
                    Message(role="tool", tool_call_id=told.call_id, content=told.output)
                )
            elif kind == "message":
                kept = {key: item[key] for key in ("role", "content", "name") if key in item}
                messages.append(Message.model_validate(kept))
            else:
                raise bad_request(
                    f"Input of type {str(kind)[:40]!r} is not supported; send messages, "
                    "function_call and function_call_output.",
                    param="input",
                )
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            message = f"input[{at}] ({str(kind)[:40]}): {where}: {first['msg']}."
            raise bad_request(message, param="input") from None
    return messages
