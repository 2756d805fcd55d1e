"""Structural tags: free text in which some beginnings lead into JSON of a given schema.

The notation is the one that other engines know: ``structures`` of begin, schema and end, and
``triggers``, the beginnings of begins. Text is free up to a trigger; from there on it must go on as
one of the structures that begin with it, and is free again behind its end. Two keys are ours alone.
``at_start``: a text that begins with a trigger, or with space and a trigger, is one structure, and
any other is free throughout. ``otherwise``: a schema; the text is structures and nothing else, or
JSON of that schema.
"""

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from qoq.errors import RequestError

Tag = Mapping[str, Any]


def check(tag: object) -> None:
    """Raise RequestError unless ``tag`` is a structural tag."""
    tag = tag if isinstance(tag, Mapping) else {}
    structures, triggers = tag.get("structures"), tag.get("triggers")
    if not isinstance(structures, list) or not isinstance(triggers, list):
        raise RequestError("structural_tag must have a list of structures and a list of triggers.")
    if not structures or not all(isinstance(t, str) and t for t in triggers):
        raise RequestError("structural_tag needs a structure, and triggers that are not empty.")
    for at, structure in enumerate(structures):
        known = isinstance(structure, Mapping)
        begin = structure.get("begin") if known else None
        if not isinstance(begin, str) or not any(begin.startswith(t) for t in triggers):
            raise RequestError(
                f"structural_tag: structures[{at}].begin must be a text that starts with a trigger."
            )
        if not isinstance(structure.get("end"), str):
            raise RequestError(f"structural_tag: structures[{at}].end must be a text.")
        if not _is_schema(structure.get("schema")):
            raise RequestError(f"structural_tag: structures[{at}].schema must be a JSON schema.")
    if "otherwise" in tag and (tag.get("at_start") or not _is_schema(tag["otherwise"])):
        raise RequestError("structural_tag: otherwise must be a JSON schema, without at_start.")


def lark(tag: Tag, special: Mapping[str, int], free: Collection[int], whitespace: str) -> str:
    """A grammar in llguidance's Lark notation.

    special: the tokens that no text is spelled with, and their ids; ``free`` are those of them that
    may all the same stand in free text. ``whitespace``: a pattern for it between marks of JSON.
    """
    split = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
    triggers = list(tag["triggers"])
    starting = {special[found[0]] for t in triggers if (found := split.match(t))}
    loose = " | ".join(f"<[{i}]>" for i in sorted(set(free) - starting))

    def spelled(text: str) -> str:
        """A text as a sequence of literals and special tokens."""
        out, end = [], 0
        for found in split.finditer(text):
            out += [json.dumps(text[end : found.start()])] if found.start() > end else []
            out.append(f"<[{special[found[0]]}]>")
            end = found.end()
        out += [json.dumps(text[end:])] if end < len(text) else []
        return " ".join(out)

    def bodies(trigger: str, drop: int) -> str:
        """Any of a trigger's structures, from their ``drop``-th character on."""
        return " | ".join(
            f"({spelled(s['begin'][drop:])} %json {_schema(s['schema'], whitespace)} "
            f"{spelled(s['end'])})"
            for s in tag["structures"]
            if s["begin"].startswith(trigger)
        )

    rules = ["%llguidance {}", "TEXT: /(.|\\n)*/", f"text: (TEXT{f' | {loose}' * bool(loose)})*"]
    used = [t for t in triggers if bodies(t, 0)]
    if tag.get("at_start"):
        begun = "|".join(_pattern(t) for t in triggers)
        rules.append(f"OTHER: /(.|\\n)*/ & ~/[ \\t\\r\\n]*({begun})(.|\\n)*/")
        rules.append(f"start: OTHER | OTHER ({loose}) text" if loose else "start: OTHER")
        return "\n".join([*rules, *(f"  | {bodies(t, 0)}" for t in used)])
    tags = " | ".join(f"tag_{at}" for at in range(len(used)))
    if "otherwise" in tag:
        rules.append("SPACE: /[ \\t\\r\\n]{1,40}/")
        json_text = f"%json {_schema(tag['otherwise'], whitespace)}"
        rules.append(f"start: ({tags}) (SPACE? ({tags}))* SPACE? | {json_text}")
    else:
        rules.append(f"start: ({tags})* text")
    for at, trigger in enumerate(used):
        if "otherwise" in tag:
            lead = spelled(trigger)
        elif split.match(trigger):
            lead = f"text {spelled(trigger)}"
        elif split.search(trigger):
            raise RequestError("structural_tag: a trigger may have a special token only in front.")
        else:
            # Free text ends where a trigger is complete, so both are one lazy lexeme.
            rules.append(f"lead_{at}[lazy]: TEXT {json.dumps(trigger)}")
            lead = f"(TEXT? ({loose}))* lead_{at}" if loose else f"lead_{at}"
        rules.append(f"tag_{at}: {lead} ({bodies(trigger, len(trigger))})")
    return "\n".join(rules)


def _is_schema(value: object) -> bool:
    return isinstance(value, Mapping | bool)


def _schema(schema: Mapping[str, Any] | bool, whitespace: str) -> str:
    value = {} if schema is True else {"not": {}} if schema is False else dict(schema)
    return json.dumps({**value, "x-guidance": {"whitespace_pattern": whitespace}})


def _pattern(text: str) -> str:
    """A regular expression for ``text`` itself, as it stands between slashes."""
    return "".join(c if c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)
