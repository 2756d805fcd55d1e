"""tool_choice and the structure that forces a call; which parser a template needs."""

import json
from typing import Any

import pytest

from qoq.errors import RequestError
from qoq.tools.choose import choose_parser
from qoq.tools.parsers import CallList, Hermes, OneCall
from qoq.tools.request import ToolPlan, plan_tools

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def tool(name: str, parameters: Any = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [tool("weather", CITY), tool("now")]


def forced(plan: ToolPlan) -> dict[str, Any]:
    """The schema that a whole text must follow."""
    assert plan.structure is not None
    schema = plan.structure["json"]
    assert isinstance(schema, dict)
    return schema


def deep(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"properties": {"a": value}}
    return value


def test_none_and_auto() -> None:
    for tools, choice in ((None, None), ([], "auto"), (TOOLS, "none")):
        assert plan_tools(tools, choice, parser="hermes") == ToolPlan()
    for choice in (None, "auto"):
        plan = plan_tools(TOOLS, choice, parser="hermes")
        assert (plan.choice, plan.structure) == ("auto", None)
        assert isinstance(plan.parser and plan.parser(), Hermes)
        assert plan_tools(TOOLS, choice) == ToolPlan("auto")


def test_named_function_is_its_parameters() -> None:
    plan = plan_tools(TOOLS, {"type": "function", "function": {"name": "weather"}})
    assert (plan.choice, plan.structure) == ("named", {"json": CITY})
    assert plan.parser is not None
    assert isinstance(plan.parser(), OneCall)


def test_required_is_a_list_of_calls() -> None:
    plan = plan_tools(TOOLS, "required", parallel=False)
    assert (plan.choice, plan.parser) == ("required", CallList)
    schema = forced(plan)
    assert (schema["minItems"], schema["maxItems"]) == (1, 1)
    names = [c["properties"]["name"]["const"] for c in schema["items"]["anyOf"]]
    assert names == ["weather", "now"]


def test_definitions_move_to_the_root_and_stay_apart() -> None:
    def with_definition(kind: str) -> dict[str, Any]:
        return {
            "type": "object",
            "properties": {"x": {"$ref": "#/$defs/x"}, "y": {"items": [{"$ref": "#/$defs/x"}]}},
            "$defs": {"x": {"type": kind, "else": {"$ref": "#/$defs/x"}}},
        }

    tools = [tool("a", with_definition("string")), tool("b", with_definition("integer"))]
    schema = forced(plan_tools(tools, "required"))
    text = json.dumps(schema)
    assert "#/$defs/x" not in text
    assert schema["$defs"]["0-$defs-x"]["type"] == "string"
    assert schema["$defs"]["1-$defs-x"]["type"] == "integer"
    assert text.count("#/$defs/1-$defs-x") == 3
    assert tools[0]["function"]["parameters"] == with_definition("string")


def test_required_schema_compiles_and_its_text_is_parsed(tmp_path: Any) -> None:
    from helpers.tiny import write_byte_tokenizer
    from qoq.engine.structured import Grammars
    from qoq.engine.structured_params import StructuredOutputsParams
    from qoq.tokenizer import Tokenizer
    from qoq.tools.parsers import parse

    write_byte_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    grammars = Grammars(tokenizer, len(tokenizer))
    listed = tool(
        "l",
        {**CITY, "properties": {"city": {"$ref": "#/$defs/c"}}, "$defs": {"c": {"enum": ["Rome"]}}},
    )
    plan = plan_tools([*TOOLS, listed], "required")
    text = json.dumps(
        [
            {"name": "weather", "parameters": {"city": "x"}},
            {"name": "l", "parameters": {"city": "Rome"}},
        ]
    )
    m = grammars.matcher(StructuredOutputsParams(json=forced(plan)))
    for i in tokenizer.encode(text, special=False):
        assert m.allowed()[i]
        done = m.accept(i)
    assert done
    assert plan.parser is not None
    assert [c.name for c in parse(plan.parser(), text).calls] == ["weather", "l"]


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        (None, "required", "tools is empty"),
        ([], {"type": "function", "function": {"name": "f"}}, "tools is empty"),
        (TOOLS, {"type": "function", "function": {"name": "f"}}, "'f', which is not one of"),
        (TOOLS, "sometimes", "tool_choice must be"),
        (TOOLS, {"name": "weather"}, "tool_choice must be"),
        ([tool("a"), tool("a")], "auto", "two functions named 'a'"),
        ([{"type": "retrieval"}], "auto", r"tools\[0\] must be"),
        ([{"type": "function"}], "auto", r"tools\[0\].function is missing"),
        ([tool("")], "auto", "name must be"),
        ([tool("a", [1])], "auto", "parameters must be"),
        ([tool(f"f{i}") for i in range(200)], "auto", "at most"),
        (["a"], "auto", r"tools\[0\] must be"),
        ([tool("a", deep(60))], "none", "nested"),
        ([tool("a", deep(5000))], "required", "nested"),
        ([{"type": "function", "function": {"name": "f", "strict": 1}}], "auto", "strict must be"),
    ],
)
def test_what_cannot_be_is_named(tools: Any, choice: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        plan_tools(tools, choice)
    assert caught.value.param == ("tool_choice" if "tool_choice" in str(caught.value) else "tools")


def test_unknown_parser() -> None:
    with pytest.raises(RequestError, match="there are hermes, llama3_json, mistral"):
        plan_tools(TOOLS, "auto", parser="x")


@pytest.mark.parametrize(
    ("template", "model_type", "wanted"),
    [
        (None, "qwen2", None),
        ("{{ messages }}", "llama", None),
        ("{% if tools %}<tool_call>{% endif %}", "", "hermes"),
        ("{% if tools %}<tool_call><function=f>{% endif %}", "qwen3", None),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS]", "llama", "mistral"),
        ("{% if tools %}<|python_tag|>{% endif %}", "llama", "llama3_json"),
        ("{% if tools %}{% endif %}", "llama", "llama3_json"),
        ("{% if tools %}{% endif %}", "qwen2", "hermes"),
        ("{% if tools %}{% endif %}", "strange", None),
    ],
)
def test_parser_of_a_template(template: str | None, model_type: str, wanted: str | None) -> None:
    assert choose_parser(template, model_type) == wanted
