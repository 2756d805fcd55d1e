"""One parser for each way that models write calls; the same machine for a stream and a whole text.

A parser takes a text in pieces and returns events; how the text is cut into pieces changes nothing
of what the events say together. Whitespace next to a call is not content.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby

from qoq.tools.calls import CallArguments, CallStart, Content, Event, ToolText, collect
from qoq.tools.scan import CallReader, ValueEnd

_SPACE = " \t\r\n"
_MAX_SPACE = 256  # so much of it waits to see whether a call follows


class Parser:
    """Text in, events out: content up to a mark, then whatever the subclass reads.

    A subclass names its ``marks`` and reads what follows one in ``_read``, a character at a time.
    """

    marks: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._calls = 0
        self._held = ""  # may become a mark, or is space that may be next to one
        self._after_call = False  # nothing but space since the last call
        self._inside = False
        self._queue: deque[str] = deque()

    def push(self, piece: str) -> list[Event]:
        """What ``piece`` makes certain."""
        self._queue.extend(piece)
        events: list[Event] = []
        while self._queue:
            events += self._one(self._queue.popleft())
        return _joined(events)

    def finish(self) -> list[Event]:
        """What is left when no text follows."""
        events = list(self._end()) if self._inside else []
        if not self._after_call or self._held.strip(_SPACE):
            rest = self._held if not self._calls else self._held.rstrip(_SPACE)
            events += [Content(rest)] if rest else []
        self._held = ""
        return _joined(events)

    def _one(self, char: str) -> Iterator[Event]:
        if self._inside:
            yield from self._read(char)
            return
        self._held += char
        mark = next((m for m in self.marks if self._held.endswith(m)), None)
        if mark is not None:
            text = self._held.removesuffix(mark)
            yield from self._content(text.rstrip(_SPACE) if text.strip(_SPACE) else "")
            self._held = ""
            self._inside = True
            self._open(mark)
            return
        keep = self._may_be_mark()
        certain = self._held[: len(self._held) - keep]
        spaces = len(certain) - len(certain.rstrip(_SPACE))
        if certain.strip(_SPACE):
            end = len(certain) - spaces
            text, self._held = self._held[:end], self._held[end:]
            yield from self._content(text)
        elif len(certain) > _MAX_SPACE:
            self._held = self._held[len(certain) :]
            yield from self._content(certain)

    def _may_be_mark(self) -> int:
        """How many characters at the end of what is held may begin a mark."""
        return max(
            (
                n
                for mark in self.marks
                for n in range(1, len(mark))
                if self._held.endswith(mark[:n])
            ),
            default=0,
        )

    def _content(self, text: str) -> Iterator[Event]:
        if self._after_call:
            text = text.lstrip(_SPACE)
        if text:
            self._after_call = False
            yield Content(text)

    def _start(self, name: str) -> CallStart:
        self._calls += 1
        return CallStart(self._calls - 1, name)

    def _arguments(self, text: str) -> Iterator[Event]:
        if text:
            yield CallArguments(self._calls - 1, text)

    def _leave(self, again: str = "", mark: str = "") -> Iterator[Event]:
        """Back to content: ``mark`` was none, and ``again``, which followed it, is read anew."""
        self._inside = False
        self._after_call = self._calls > 0
        yield from self._content(mark)
        self._queue.extendleft(reversed(again))

    def _open(self, mark: str) -> None:
        raise NotImplementedError

    def _read(self, char: str) -> Iterator[Event]:
        raise NotImplementedError

    def _end(self) -> Iterator[Event]:
        """The text ended after a mark."""
        raise NotImplementedError


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
            self._held = self._mark + self._raw + self._reader.raw
        yield from ()


class Hermes(_Objects):
    """<tool_call>{"name": ..., "arguments": {...}}</tool_call>, as Hermes and Qwen write."""

    marks = ("<tool_call>",)
    _CLOSE = "</tool_call>"

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
            elif char not in _SPACE:
                yield from self._leave(char)
        else:
            self._raw += char
            if char == "[":
                self._state = "object"
            elif char not in _SPACE:
                yield from self._no_list(char)

    def _no_list(self, char: str) -> Iterator[Event]:
        """``char`` follows the mark instead of a list; it is in ``_raw`` already."""
        yield from self._give_up()


class Mistral(_Lists):
    """[TOOL_CALLS] and then [{"name": ..., "arguments": {...}}, ...] or name{...}."""

    marks = ("[TOOL_CALLS]",)
    _ARGS = "[ARGS]"
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
        name = self._raw[:-1].strip(_SPACE).removesuffix(self._ARGS)
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

    def __init__(self) -> None:
        super().__init__()
        self._inside = True
        self._open("")


class Llama3(_Objects):
    """{"name": ..., "parameters": {...}}, several parted by ";", from the beginning of the text.

    <|python_tag|> may come first.
    """

    required = True
    _TAG = "<|python_tag|>"

    def __init__(self) -> None:
        super().__init__()
        self._inside = True
        self._open("")

    def _read(self, char: str) -> Iterator[Event]:
        if self._reader.done:
            if char == ";":
                self._fresh()
            elif char not in _SPACE:
                yield from self._leave(char)
            return
        if not self._reader.raw:
            tag = self._raw.strip(_SPACE)
            if char in _SPACE or self._TAG.startswith(tag + char):
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


PARSERS: dict[str, Callable[[], Parser]] = {
    "hermes": Hermes,
    "llama3_json": Llama3,
    "mistral": Mistral,
}
"""By the names that vLLM's --tool-call-parser has for them."""


def parse(parser: Parser, text: str) -> ToolText:
    """A whole text through a fresh parser."""
    return collect([*parser.push(text), *parser.finish()])


def _joined(events: Iterable[Event]) -> list[Event]:
    """Neighbours of one kind made one, so that a piece of text gives few events."""
    out: list[Event] = []
    for kind, run in groupby(events, key=lambda e: (type(e), getattr(e, "index", None))):
        some = list(run)
        if kind[0] is Content:
            out.append(Content("".join(e.text for e in some if isinstance(e, Content))))
        elif kind[0] is CallArguments:
            text = "".join(e.text for e in some if isinstance(e, CallArguments))
            out.append(CallArguments(some[0].index, text))  # type: ignore[union-attr]
        else:
            out += some
    return out
