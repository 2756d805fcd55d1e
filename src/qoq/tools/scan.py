"""One call's JSON object, read character by character: its name, and its arguments as they come.

Arguments are passed on as they are written, so they can be streamed; whether they are right is for
whoever runs the function to see.
"""

import json
from typing import Literal

_SPACE = " \t\r\n"
_ARGUMENTS = ("arguments", "parameters")
# Between values: what may come in each state, and the state after it where that is a mark.
_EXPECTED = {
    "open": "{",
    "first": '"}',
    "next": ",}",
    "member": '"',
    "colon": ":",
    "begin": "",
}
_FOLLOWING = {"open": "first", "next": "member", "colon": "begin"}


class ValueEnd:
    """Finds where a JSON value ends; brackets are counted, nothing else is judged."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._begun = False

    def push(self, char: str) -> Literal["more", "last", "past"]:
        """What ``char`` is: inside the value, its last character, or the first one after it."""
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
                return "more" if self._depth else "last"
            return "more"
        if not self._depth and self._begun and char in ",}]" + _SPACE:
            return "past"  # a number or a word
        self._begun = True
        if char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            if self._depth <= 0:
                return "last"
        return "more"


class CallReader:
    """Reads {"name": ..., "arguments" or "parameters": {...}}, members in any order.

    ``started`` once the name is known and arguments have begun, or the object has ended; from then
    on the object counts as a call. ``raw`` is what was read until then. ``failed``: it is no such
    object.
    """

    def __init__(self, *, arguments_required: bool = False) -> None:
        """arguments_required: an object without arguments is no call."""
        self.name: str | None = None
        self.started = False
        self.done = False
        self.failed = False
        self.raw = ""
        self._required = arguments_required
        self._state = "open"
        self._key = ""
        self._value = ""
        self._end = ValueEnd()
        self._live = False  # the arguments are being passed on
        self._held: str | None = None  # arguments that came before the name

    def push(self, char: str) -> str:
        """The arguments' text that ``char`` makes certain, often ""."""
        if not self.started:
            self.raw += char
        if self._state in ("key", "value"):
            return self._inside(char)
        if char in _SPACE:
            return ""
        if self._state == "begin" and char not in ",:}]":
            self._begin("value")
            wanted = self._key in _ARGUMENTS and self._held is None
            self._live = wanted and self.name is not None and char == "{"
            self.started = self.started or self._live
            return self._inside(char)
        if char not in _EXPECTED[self._state]:
            self._fail()
        elif char == "}":
            return self._close()
        elif char == '"':
            self._begin("key")
            return self._inside(char)
        else:
            self._state = _FOLLOWING[self._state]
        return ""

    def _begin(self, state: str) -> None:
        self._state, self._value, self._end = state, "", ValueEnd()

    def _inside(self, char: str) -> str:
        place = self._end.push(char)
        out = ""
        if place != "past":
            out = char if self._live else ""
            if not self._live:
                self._value += char
        if place != "more":
            out += self._value_ended()
            if place == "past" and not self.done:
                if not self.started:
                    self.raw = self.raw[:-1]
                out += self.push(char)
        return out

    def _value_ended(self) -> str:
        if self._state == "key":
            key = _loads(self._value)
            if not isinstance(key, str):
                self._fail()
            else:
                self._key, self._state = key, "colon"
            return ""
        self._state = "next"
        if self._live:
            self._live = False
            self._held = ""
        elif self._key == "name" and self.name is None:
            name = _loads(self._value)
            if not isinstance(name, str) or not name:
                self._fail()
                return ""
            self.name = name
            if self._held is not None:
                self.started = True
                return self._held
        elif self._key in _ARGUMENTS and self._held is None:
            self._held = _as_object(self._value)
            if self._held is None:
                self._fail()
            elif self.name is not None:
                self.started = True
                return self._held
        return ""

    def _close(self) -> str:
        if self.name is None or (self._required and self._held is None):
            self._fail()
            return ""
        self.done = True
        self.started = True
        return "{}" if self._held is None else ""

    def _fail(self) -> None:
        # What has begun as a call stays one: its pieces are already with the reader.
        self.failed, self.done = not self.started, True


def _as_object(text: str) -> str | None:
    """Arguments as an object's JSON text: some models write that text into a string, or null."""
    value = _loads(text)
    if isinstance(value, str):
        text, value = value, _loads(value)
    if value is None:
        return "{}"
    return text.strip() if text.strip().startswith("{") else None


def _loads(text: str) -> object:
    """The value of JSON text; a lone object() where it is none."""
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        return object()
    return value
