"""Tools and tool_choice as a request brings them, and the structure that forces a call."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qoq.errors import RequestError
from qoq.tools.machine import Parser
from qoq.tools.parsers import PARSERS, CallList, OneCall

MAX_TOOLS = 128


@dataclass(frozen=True)
class ToolPlan:
    """How a request's calls come about.

    json_schema: the form that the text must have, or None; parser makes a fresh parser of the
    text, or is None where calls are not looked for; required: the answer is a call.
    """

    json_schema: Mapping[str, Any] | None = None
    parser: Callable[[], Parser] | None = None
    required: bool = False


def plan_tools(
    tools: Sequence[Mapping[str, Any]] | None,
    tool_choice: str | Mapping[str, Any] | None = None,
    *,
    parser: str | None = None,
    parallel: bool = True,
) -> ToolPlan:
    """What ``tool_choice`` means with these ``tools``, both as in OpenAI's requests.

    tool_choice: "none", "auto" (what no choice means where there are tools), "required", or one
    function by name. ``parser`` (a name in PARSERS) is for "auto"; without one no calls are looked
    for. ``parallel`` False allows a forced answer one call only. Raises RequestError.
    """
    functions = [_function(tool, at) for at, tool in enumerate(tools or ())]
    if len(functions) > MAX_TOOLS:
        raise RequestError(f"tools has {len(functions)} entries; at most {MAX_TOOLS} are taken.")
    names = [function["name"] for function in functions]
    twice = next((name for at, name in enumerate(names) if name in names[:at]), None)
    if twice is not None:
        raise RequestError(f"tools has two functions named {twice!r}; give each its own name.")
    if tool_choice is None:
        tool_choice = "auto" if functions else "none"
    if tool_choice == "none":
        return ToolPlan()
    if tool_choice != "auto" and not functions:
        raise RequestError("tool_choice asks for a call but tools is empty; name the functions.")
    if tool_choice == "auto":
        if parser is not None and parser not in PARSERS:
            known = ", ".join(PARSERS)
            raise RequestError(f"There is no tool call parser {parser!r}; there are {known}.")
        return ToolPlan(parser=PARSERS[parser] if parser and functions else None)
    if tool_choice == "required":
        return ToolPlan(_list_schema(functions, parallel), CallList, required=True)
    name = _chosen(tool_choice)
    if name not in names:
        raise RequestError(f"tool_choice names {name!r}, which is not one of tools.")
    schema = functions[names.index(name)]["parameters"]
    return ToolPlan(schema, lambda: OneCall(name), required=True)


def _function(tool: object, at: int) -> dict[str, Any]:
    """name and parameters of one entry of tools."""
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(tool, Mapping) or tool.get("type", "function") != "function":
        raise RequestError(f"tools[{at}] must be an object of type function.")
    if not isinstance(function, Mapping):
        raise RequestError(f"tools[{at}].function is missing.")
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not name or len(name) > 256:
        raise RequestError(f"tools[{at}].function.name must be a string of 1 to 256 characters.")
    if parameters is None or parameters == {}:
        parameters = {"type": "object", "properties": {}}
    if not isinstance(parameters, Mapping):
        raise RequestError(f"tools[{at}].function.parameters must be a JSON schema.")
    return {"name": name, "parameters": parameters}


def _chosen(tool_choice: object) -> str:
    function = tool_choice.get("function") if isinstance(tool_choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise RequestError(
            'tool_choice must be "none", "auto", "required" or {"type": "function", "function": '
            '{"name": ...}}.'
        )
    return name


def _list_schema(functions: Sequence[Mapping[str, Any]], parallel: bool) -> dict[str, Any]:
    """A list of calls, each of one of the functions.

    Schemas refer to their own definitions by "#/$defs/...", which here is the root of another
    schema, so definitions move there under names of their own.
    """
    definitions: dict[str, Any] = {}
    calls = []
    for at, function in enumerate(functions):
        parameters = dict(function["parameters"])
        for key in ("$defs", "definitions"):
            for name, value in dict(parameters.pop(key, {})).items():
                definitions[f"{at}-{key}-{name}"] = _moved(value, at)
        calls.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": function["name"]},
                    "parameters": _moved(parameters, at),
                },
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if not parallel:
        schema["maxItems"] = 1
    return {**schema, "$defs": definitions} if definitions else schema


def _moved(value: Any, at: int) -> Any:
    """A schema whose references lead to where its definitions went."""
    if isinstance(value, list):
        return [_moved(item, at) for item in value]
    if not isinstance(value, Mapping):
        return value
    out = {key: _moved(item, at) for key, item in value.items()}
    target = out.get("$ref")
    if isinstance(target, str):
        for key in ("$defs", "definitions"):
            prefix = f"#/{key}/"
            if target.startswith(prefix):
                name, _, rest = target.removeprefix(prefix).partition("/")
                out["$ref"] = f"#/$defs/{at}-{key}-{name}" + (f"/{rest}" if rest else "")
    return out
