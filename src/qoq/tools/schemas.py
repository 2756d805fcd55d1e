"""JSON schemas of calls, put together from those of functions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Function = Mapping[str, Any]  # name, parameters (a JSON schema), strict
Schema = Mapping[str, Any]


def list_of_calls(functions: Sequence[Function], parallel: bool) -> dict[str, Any]:
    """A list of calls, each of one of the functions; ``parallel`` False: of one call."""
    schema: dict[str, Any] = {"type": "array", "minItems": 1}
    if not parallel:
        schema["maxItems"] = 1
    return _with_definitions(
        [function["parameters"] for function in functions],
        lambda each: {**schema, "items": {"anyOf": _calls(functions, each)}},
    )


def call_or(answer: Schema, functions: Sequence[Function]) -> dict[str, Any]:
    """One call, or what ``answer`` describes."""
    return _with_definitions(
        [answer, *(parameters_of(function) for function in functions)],
        lambda each: {"anyOf": [each[0], *_calls(functions, each[1:])]},
    )


def parameters_of(function: Function) -> Schema:
    """What arguments must be where only strict functions are held to their schemas."""
    schema: Schema = function["parameters"] if function["strict"] else {"type": "object"}
    return schema


def _calls(functions: Sequence[Function], parameters: Sequence[Schema]) -> list[dict[str, Any]]:
    return [
        {
            "type": "object",
            "properties": {"name": {"const": function["name"]}, "parameters": schema},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for function, schema in zip(functions, parameters, strict=True)
    ]


def _with_definitions(
    schemas: Sequence[Schema], whole: Callable[[list[dict[str, Any]]], dict[str, Any]]
) -> dict[str, Any]:
    """``whole`` of the schemas, as one schema.

    Schemas refer to their own definitions by "#/$defs/...", which here is the root of another
    schema, so definitions move there under names of their own.
    """
    definitions: dict[str, Any] = {}
    moved = []
    for at, schema in enumerate(schemas):
        own = dict(schema)
        for key in ("$defs", "definitions"):
            for name, value in dict(own.pop(key, {})).items():
                definitions[f"{at}-{key}-{name}"] = _moved(value, at)
        moved.append(_moved(own, at))
    return {**whole(moved), "$defs": definitions} if definitions else whole(moved)


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
