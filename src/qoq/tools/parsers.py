"""One parser for each way that models write calls; the same for a stream and for a whole text."""

from collections.abc import Collection, Iterator

from qoq.tools.calls import Event, ToolText, collect
from qoq.tools.machine import SPACE, Parser
from qoq.tools.scan import CallReader, ValueEnd


class _Objects(Parser):
    """Parsers whose calls are JSON objects with a name and arguments."""

    required = False

    def _open(self, mark: str) -> None:
        self._mark = mark
        self._fresh()

    def _fresh(self) -> None:
        self._raw = ""  # since the mark, before the object
        self._reader = CallReader(arguments_required=self.required)
        self._announced = False

    def _feed(self, char: str) -> Iterator[Event]:
        text = self._reader.push(char)
        if self._reader.started and not self._announced:
            self._announced = True
            yield self._start(self._reader.name or "")
        if self._announced:
            yield from self._arguments(text)

    def _give_up(self) -> Iterator[Event]:
        yield from self._leave(self._raw + self._reader.raw, self._mark)

    def _end(self) -> Iterator[Event]:
        # Of a further object of a list, what was cut off is nothing to read.
        if not self._announced and not self._reader.done and (self._mark or not self._calls):
            before = self._space + self._mark if self._mark else ""
            self._held = before + self._raw + self._reader.raw
        yield from ()


class Hermes(_Objects):
    """<tool_call>{"name": ..., "arguments": {...}}</tool_call>, as Hermes and Qwen write."""

    marks = ("<tool_call>",)
    _CLOSE = "</tool_call>"
    tokens = (*marks, _CLOSE)

    def _open(self, mark: str) -> None:
        super()._open(mark)
        self._tail = ""

    def _read(self, char: str) -> Iterator[Event]:
        if not self._reader.done:
            yield from self._feed(char)
            if self._reader.failed:
                yield from self._give_up()
            return
        self._tail = (self._tail + char)[-len(self._CLOSE) :]
        if self._tail == self._CLOSE:
            yield from self._leave()


class _Lists(_Objects):
    """Parsers of [{"name": ..., "arguments": {...}}, ...]."""

    def _open(self, mark: str) -> None:
        super()._open(mark)
        self._state = "begin"

    def _read(self, char: str) -> Iterator[Event]:
        if self._state == "object":
            yield from self._feed(char)
            if self._reader.failed:
                yield from self._give_up()
            elif self._reader.done:
                self._state = "between"
        elif self._state == "between":
            if char == ",":
                self._state, self._mark = "object", ""
                self._fresh()
            elif char == "]":
                yield from self._leave()
            elif char not in SPACE:
                yield from self._leave(char)
        else:
            self._raw += char
            if char == "[":
                self._state = "object"
            elif char not in SPACE:
                yield from self._no_list(char)

    def _no_list(self, char: str) -> Iterator[Event]:
        """``char`` follows the mark instead of a list; it is in ``_raw`` already."""
        yield from self._give_up()


class Mistral(_Lists):
    """[TOOL_CALLS] and then [{"name": ..., "arguments": {...}}, ...] or name[ARGS]{...}.

    Before [ARGS] there may be [CALL_ID] and an id, and [ARGS] itself may be missing.
    """

    marks = ("[TOOL_CALLS]",)
    _ARGS = "[ARGS]"
    _ID = "[CALL_ID]"
    tokens = (*marks, _ARGS, _ID)
    _MAX_NAME = 256

    def _read(self, char: str) -> Iterator[Event]:
        if self._state == "values":
            place = self._value.push(char)
            yield from self._arguments(char)
            if place == "last":
                yield from self._leave()
        elif self._state == "name":
            self._raw += char
            yield from self._no_list(char)
        else:
            yield from super()._read(char)

    def _no_list(self, char: str) -> Iterator[Event]:
        self._state = "name"
        name = self._raw[:-1].strip(SPACE).removesuffix(self._ARGS).partition(self._ID)[0]
        if char == "{" and name:
            self._state, self._value = "values", ValueEnd()
            self._value.push(char)
            self._announced = True
            yield self._start(name)
            yield from self._arguments(char)
        elif char in "{}\n\"'" or len(self._raw) > self._MAX_NAME:
            yield from self._give_up()


class CallList(_Lists):
    """A bare [{"name": ..., "parameters": {...}}, ...]: what a required call is forced into."""

    def __init__(self, hidden: Collection[str] = ()) -> None:
        super().__init__(hidden)
        self._inside = True
        self._open("")


class Llama3(_Objects):
    """{"name": ..., "parameters": {...}}, several parted by ";", from the beginning of the text.

    <|python_tag|> may come first.
    """

    required = True
    _TAG = "<|python_tag|>"
    tokens = (_TAG,)

    def __init__(self, hidden: Collection[str] = ()) -> None:
        super().__init__(hidden)
        self._inside = True
        self._open("")

    def _read(self, char: str) -> Iterator[Event]:
        if self._reader.done:
            if char == ";":
                self._fresh()
            elif char not in SPACE:
                yield from self._leave(char)
            return
        if not self._reader.raw:
            tag = self._raw.strip(SPACE)
            if char in SPACE or self._TAG.startswith(tag + char):
                self._raw += char
                return
            if tag not in ("", self._TAG):
                self._raw += char
                yield from self._give_up()
                return
        yield from self._feed(char)
        if self._reader.failed:
            yield from self._give_up()


class OneCall(Parser):
    """The whole text is the arguments of one function: what a named tool_choice forces."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self._inside = True

    def _read(self, char: str) -> Iterator[Event]:
        if not self._calls:
            yield self._start(self._name)
        yield from self._arguments(char)

    def _end(self) -> Iterator[Event]:
        yield from ()


PARSERS: dict[str, type[Parser]] = {
    "hermes": Hermes,
    "llama3_json": Llama3,
    "mistral": Mistral,
}
"""By the names that vLLM's --tool-call-parser has for them."""


def parse(parser: Parser, text: str) -> ToolText:
    """A whole text through a fresh parser."""
    return collect([*parser.push(text), *parser.finish()])
