"""Tools and tool_choice as a request brings them, and the structure that forces a call."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from qoq.errors import RequestError
from qoq.tools.machine import Parser
from qoq.tools.parsers import PARSERS, CallList, OneCall
from qoq.tools.schemas import Schema, list_of_calls
from qoq.tools.strict import call_form

MAX_TOOLS = 128
MAX_DEPTH = 100  # of the JSON of tools; what reads it goes down one call a level

Choice = Literal["none", "auto", "required", "named"]


@dataclass(frozen=True)
class ToolPlan:
    """How a request's calls come about.

    structure: arguments of StructuredOutputsParams for the form that the text must have, or None;
    parser makes a fresh parser of a text, or is None where calls are not looked for; parallel:
    whether there may be several.
    """

    choice: Choice = "none"
    structure: Mapping[str, Any] | None = None
    parser: Callable[[], Parser] | None = None
    parallel: bool = True


def plan_tools(
    tools: Sequence[Mapping[str, Any]] | None,
    tool_choice: str | Mapping[str, Any] | None = None,
    *,
    parser: str | None = None,
    hidden: Collection[str] = (),
    parallel: bool = True,
    answer: Schema | None = None,
) -> ToolPlan:
    """What ``tool_choice`` means with these ``tools``, both as in OpenAI's requests.

    tool_choice: "none", "auto" (what no choice means where there are tools), "required", or one
    function by name. ``parser`` (a name in PARSERS) is for "auto"; without one no calls are looked
    for; ``hidden``: texts of special tokens that the parser sees and content must not show.
    ``parallel`` False allows one call only. A forced call obeys its function's schema, and so does
    every call of a function that is ``strict``; with ``answer``, a text without calls is JSON of
    that schema. Raises RequestError.
    """
    functions = _functions(tools or ())
    names = [function["name"] for function in functions]
    if tool_choice is None:
        tool_choice = "auto" if functions else "none"
    if tool_choice == "none" or (tool_choice == "auto" and not functions):
        return ToolPlan()
    if not functions:
        raise RequestError(
            "tool_choice asks for a call but tools is empty; name the functions.",
            param="tool_choice",
        )
    if tool_choice == "auto":
        if parser is None:
            return ToolPlan("auto", parallel=parallel)
        if parser not in PARSERS:
            known = ", ".join(PARSERS)
            raise RequestError(f"There is no tool call parser {parser!r}; there are {known}.")
        held = answer is not None or any(function["strict"] for function in functions)
        form = call_form(parser, functions, answer) if held else None
        return ToolPlan("auto", form, partial(PARSERS[parser], hidden), parallel)
    if tool_choice == "required":
        schema = list_of_calls(functions, parallel)
        return ToolPlan("required", {"json": schema}, CallList, parallel)
    name = _chosen(tool_choice)
    if name not in names:
        raise RequestError(
            f"tool_choice names {name!r}, which is not one of tools.", param="tool_choice"
        )
    schema = functions[names.index(name)]["parameters"]
    return ToolPlan("named", {"json": schema}, partial(OneCall, name), parallel)


def _functions(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Name, parameters and strictness of each of the tools."""
    if len(tools) > MAX_TOOLS:
        raise _bad_tools(f"tools has {len(tools)} entries; at most {MAX_TOOLS} are taken.")
    if _deeper(tools, MAX_DEPTH):
        raise _bad_tools(f"tools is nested more than {MAX_DEPTH} levels deep; make it flatter.")
    functions = [_function(tool, at) for at, tool in enumerate(tools)]
    names = [function["name"] for function in functions]
    twice = next((name for at, name in enumerate(names) if name in names[:at]), None)
    if twice is not None:
        raise _bad_tools(f"tools has two functions named {twice!r}; give each its own name.")
    return functions


def _function(tool: object, at: int) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(tool, Mapping) or tool.get("type", "function") != "function":
        raise _bad_tools(f"tools[{at}] must be an object of type function; no other is supported.")
    if not isinstance(function, Mapping):
        raise _bad_tools(f"tools[{at}].function is missing.")
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not name or len(name) > 256:
        raise _bad_tools(f"tools[{at}].function.name must be a string of 1 to 256 characters.")
    if parameters is None or parameters == {}:
        parameters = {"type": "object", "properties": {}}
    if not isinstance(parameters, Mapping):
        raise _bad_tools(f"tools[{at}].function.parameters must be a JSON schema.")
    strict = function.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise _bad_tools(f"tools[{at}].function.strict must be true or false.")
    return {"name": name, "parameters": parameters, "strict": bool(strict)}


def _deeper(value: object, levels: int) -> bool:
    """Whether JSON is nested deeper than so many levels."""
    layer = [value]
    for _ in range(levels):
        inner = [
            each
            for one in layer
            if isinstance(one, Mapping | list | tuple)
            for each in (one.values() if isinstance(one, Mapping) else one)
        ]
        if not inner:
            return False
        layer = inner
    return True


def _bad_tools(message: str) -> RequestError:
    return RequestError(message, param="tools")


def _chosen(tool_choice: object) -> str:
    function = tool_choice.get("function") if isinstance(tool_choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise RequestError(
            'tool_choice must be "none", "auto", "required" or {"type": "function", "function": '
            '{"name": ...}}.',
            param="tool_choice",
        )
    return name
