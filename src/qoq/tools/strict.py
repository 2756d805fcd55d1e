"""Forms in which a model may answer in words or call, for structured output.

A function that is marked ``strict`` is called with arguments that obey its schema, also where the
model itself decides whether to call, and an answer in words may have a schema too. So each family's
way of writing calls is given as a form of the whole text: free up to a call's beginning (or JSON
instead), then one of the functions with its schema. Calls are written in one spelling, the one that
the family's own templates show.
"""

import json
from collections.abc import Sequence
from typing import Any

from qoq.tools.schemas import Function, Schema, call_or, parameters_of


def call_form(
    parser: str, functions: Sequence[Function], answer: Schema | None = None
) -> dict[str, Any]:
    """Arguments of StructuredOutputsParams for a text that ``parser`` (a name in PARSERS) reads.

    answer: the schema of a text without calls; None: any text.
    """
    if parser == "llama3_json" and answer is not None:
        return {"json": call_or(answer, functions)}  # a call is such JSON itself
    tag = _FORMS[parser](functions)
    return {"structural_tag": tag if answer is None else {**tag, "otherwise": answer}}


def _hermes(functions: Sequence[Function]) -> dict[str, Any]:
    way = ('<tool_call>\n{{"name": {name}, "arguments": ', "}\n</tool_call>")
    return _tag(["<tool_call>"], [way], functions)


def _mistral(functions: Sequence[Function]) -> dict[str, Any]:
    ways = [
        ('[TOOL_CALLS][{{"name": {name}, "arguments": ', "}]"),
        ('[TOOL_CALLS] [{{"name": {name}, "arguments": ', "}]"),
        ("[TOOL_CALLS]{bare}[ARGS]", ""),
    ]
    return _tag(["[TOOL_CALLS]"], ways, functions)


def _llama3(functions: Sequence[Function]) -> dict[str, Any]:
    """Calls have no mark of their own: a text that begins like one is one, and nothing else."""
    way = ('{{"name": {name}, "parameters": ', "}")
    # The second is no spelling of ours, so a text cannot go on from it.
    return {**_tag(['{"name"', '{ "name"'], [way], functions), "at_start": True}


def _tag(
    triggers: list[str], ways: Sequence[tuple[str, str]], functions: Sequence[Function]
) -> dict[str, Any]:
    structures = [
        {
            "begin": begin.format(name=json.dumps(function["name"]), bare=function["name"]),
            "schema": parameters_of(function),
            "end": end,
        }
        for begin, end in ways
        for function in functions
    ]
    return {"triggers": triggers, "structures": structures}


_FORMS = {"hermes": _hermes, "llama3_json": _llama3, "mistral": _mistral}
