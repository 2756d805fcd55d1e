"""What a parser finds in a text: content, the beginning of a call, pieces of its arguments."""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Content:
    """Text for the reader; never empty."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """A call begins. index: 0, 1, ... in the text; name: the function's."""

    index: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    """The next piece of the JSON text of a call's arguments, as the model wrote it; never empty."""

    index: int
    text: str


Event = Content | CallStart | CallArguments


@dataclass(frozen=True)
class ToolCall:
    """A call of function ``name``; arguments are JSON text, cut off where the model was."""

    name: str
    arguments: str


@dataclass
class ToolText:
    """A text taken apart."""

    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)


def collect(events: Iterable[Event]) -> ToolText:
    """Events of one text, in order, joined to what they say together."""
    out = ToolText()
    for event in events:
        if isinstance(event, Content):
            out.content += event.text
        elif isinstance(event, CallStart):
            out.calls.append(ToolCall(event.name, ""))
        else:
            call = out.calls[event.index]
            out.calls[event.index] = ToolCall(call.name, call.arguments + event.text)
    return out
