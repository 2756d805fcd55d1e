"""StructuredOutputsParams: the form that a request's text must have."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from qoq.engine import structural_tag
from qoq.errors import RequestError

Kind = Literal["json", "regex", "choice", "grammar", "json_object", "structural_tag"]


@dataclass(frozen=True)
class StructuredOutputsParams:
    """The text's form, named in exactly one of these ways. Bad values raise RequestError.

    json: a JSON schema, as text or as a mapping (True allows any value).
    regex: a regular expression that the whole text matches.
    choice: the text is one of these strings.
    grammar: an EBNF grammar, in GBNF (rule ``root``) or Lark notation (rule ``start``).
    json_object: any JSON object.
    structural_tag: free text with tagged JSON in it (see ``engine.structural_tag``), as text or as
    a mapping.
    """

    json: str | Mapping[str, Any] | bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        given = [f.name for f in fields(self) if getattr(self, f.name) not in (None, False)]
        if len(given) != 1:
            names = ", ".join(f.name for f in fields(self))
            raise RequestError(
                f"structured_outputs must name exactly one of {names}; "
                f"it names {' and '.join(given) if given else 'none'}."
            )
        self.spec()

    def spec(self) -> tuple[Kind, str]:
        """(kind, text): equal for equal structures, so that it can name a compiled one."""
        if self.json_object:
            return "json_object", '{"type":"object"}'
        if self.json is not None and self.json is not False:
            return "json", _json_text(self.json, "json")
        if self.structural_tag is not None:
            text = _json_text(self.structural_tag, "structural_tag")
            structural_tag.check(json.loads(text))
            return "structural_tag", text
        if self.choice is not None:
            choice = self.choice
            strings = isinstance(choice, Sequence) and not isinstance(choice, str)
            if not strings or not choice or not all(isinstance(c, str) and c for c in choice):
                raise RequestError("choice must be a list of strings, none of them empty.")
            return "choice", json.dumps(list(choice))
        name: Kind = "regex" if self.regex is not None else "grammar"
        text = getattr(self, name)
        if not isinstance(text, str) or not text:
            raise RequestError(f"{name} must be a string that is not empty.")
        return name, text


def _json_text(given: str | Mapping[str, Any] | bool, name: str) -> str:
    """A schema (or the like) as JSON text in one spelling; RequestError where it is none."""
    what = "a JSON schema, an object (or true)" if name == "json" else "a JSON object"
    try:
        value = json.loads(given) if isinstance(given, str) else given
        # The order of keys stays: it is the order in which properties are written.
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{name} must be {what}; this is no JSON ({error}).") from error
    if not isinstance(value, Mapping | bool):
        raise RequestError(f"{name} must be {what}.")
    return text
