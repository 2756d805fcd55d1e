"""The output of a response: items that grow one after the other, and the events that say so."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from qoq.tools.calls import CallStart, Content, Event

# An event of the stream: its type without "response.", and its fields.
Told = tuple[str, dict[str, Any]]


class Output:
    """Messages and calls as a text is read; only the last item is unfinished."""

    def __init__(self, response_id: str, new_call_id: Callable[[], str]) -> None:
        self.items: list[dict[str, Any]] = []
        self._id = response_id
        self._new_call_id = new_call_id
        self._open = False

    def read(self, events: Iterable[Event]) -> Iterator[Told]:
        """Take what is new of the text."""
        for event in events:
            if isinstance(event, Content):
                if not self._is_open("message"):
                    yield from self._close("completed")
                    yield from self._open_message()
                self._part["text"] += event.text
                yield "output_text.delta", self._place(delta=event.text, logprobs=[])
            elif isinstance(event, CallStart):
                yield from self._close("completed")
                yield from self._open_call(event.name)
            else:
                self.items[-1]["arguments"] += event.text
                yield "function_call_arguments.delta", self._item_place(delta=event.text)

    def finish(self, status: str) -> Iterator[Told]:
        """The text has ended; ``status`` of the response is that of its last item."""
        if not self.items:
            yield from self._open_message()
        yield from self._close(status)

    def _is_open(self, kind: str) -> bool:
        return self._open and self.items[-1]["type"] == kind

    @property
    def _part(self) -> dict[str, Any]:
        """The one part of the message that is open."""
        part: dict[str, Any] = self.items[-1]["content"][0]
        return part

    def _place(self, **facts: Any) -> dict[str, Any]:
        return self._item_place(content_index=0, **facts)

    def _item_place(self, **facts: Any) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **facts}

    def _open_message(self) -> Iterator[Told]:
        yield self._added(
            {
                "id": f"msg_{self._id}_{len(self.items)}",
                "type": "message",
                "role": "assistant",
                "status": "in_progress",
                "content": [],
            }
        )
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self.items[-1]["content"].append(part)
        yield "content_part.added", self._place(part=part)

    def _open_call(self, name: str) -> Iterator[Told]:
        yield self._added(
            {
                "id": f"fc_{self._id}_{len(self.items)}",
                "type": "function_call",
                "status": "in_progress",
                "call_id": self._new_call_id(),
                "name": name,
                "arguments": "",
            }
        )

    def _added(self, item: dict[str, Any]) -> Told:
        self._open = True
        self.items.append(item)
        return "output_item.added", {"output_index": len(self.items) - 1, "item": item}

    def _close(self, status: str) -> Iterator[Told]:
        if not self._open:
            return
        self._open = False
        item = self.items[-1]
        item["status"] = status
        if item["type"] == "message":
            yield "output_text.done", self._place(text=self._part["text"], logprobs=[])
            yield "content_part.done", self._place(part=self._part)
        else:
            told = {"name": item["name"], "arguments": item["arguments"]}
            yield "function_call_arguments.done", self._item_place(**told)
        yield "output_item.done", {"output_index": len(self.items) - 1, "item": item}
