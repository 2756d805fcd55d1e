"""The machine that all parsers share: content up to a mark, and events that say what is certain.

How a text is cut into pieces changes nothing of what its events say together. Whitespace next to a
call is not content, nor are marks that are ``hidden``, also where no call follows them.
"""

from collections import deque
from collections.abc import Collection, Iterable, Iterator
from itertools import groupby

from qoq.tools.calls import CallArguments, CallStart, Content, Event

SPACE = " \t\r\n"
_MAX_SPACE = 256  # so much of it waits to see whether a call follows


class Parser:
    """Text in, events out: content up to a mark, then whatever the subclass reads.

    A subclass names its ``marks`` and reads what follows one in ``_read``, a character at a time.
    ``tokens``: texts it needs to see that are special tokens of many vocabularies.
    """

    marks: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()

    def __init__(self, hidden: Collection[str] = ()) -> None:
        """hidden: texts that never are content, as those of special tokens."""
        self._hidden = tuple(hidden)
        self._watched = (*self.marks, *(mark for mark in hidden if mark not in self.marks))
        self._calls = 0
        self._held = ""  # may become a mark, or is space that may be next to one
        self._after_call = False  # nothing but space since the last call
        self._inside = False
        self._space = ""  # before the mark
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
        if not self._after_call or self._held.strip(SPACE):
            rest = self._held if not self._calls else self._held.rstrip(SPACE)
            for mark in self._hidden:
                rest = rest.replace(mark, "")
            events += [Content(rest)] if rest else []
        self._held = ""
        return _joined(events)

    def _one(self, char: str) -> Iterator[Event]:
        if self._inside:
            yield from self._read(char)
            return
        self._held += char
        mark = next((m for m in self._watched if self._held.endswith(m)), None)
        if mark is not None:
            text = self._held.removesuffix(mark)
            if mark not in self.marks:
                self._held = text
                return
            body = text.rstrip(SPACE)
            self._space = text[len(body) :]
            yield from self._content(body)
            self._held = ""
            self._inside = True
            self._open(mark)
            return
        keep = self._may_be_mark()
        certain = self._held[: len(self._held) - keep]
        spaces = len(certain) - len(certain.rstrip(SPACE))
        if certain.strip(SPACE):
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
                for mark in self._watched
                for n in range(1, len(mark))
                if self._held.endswith(mark[:n])
            ),
            default=0,
        )

    def _content(self, text: str) -> Iterator[Event]:
        if self._after_call:
            text = text.lstrip(SPACE)
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
        if mark:
            yield from self._content(self._space + ("" if mark in self._hidden else mark))
        self._queue.extendleft(reversed(again))

    def _open(self, mark: str) -> None:
        raise NotImplementedError

    def _read(self, char: str) -> Iterator[Event]:
        raise NotImplementedError

    def _end(self) -> Iterator[Event]:
        """The text ended after a mark."""
        raise NotImplementedError


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
