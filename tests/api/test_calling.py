"""Calls between OpenAI's API and a model: what it can do, and what its answers look like."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.tiny import write_byte_tokenizer
from qoq.api.calling import ToolCalling, blame_tools
from qoq.engine.request import SamplingParams
from qoq.engine.structured_params import StructuredOutputsParams
from qoq.errors import RequestError
from qoq.tokenizer import Tokenizer
from qoq.tools.calls import ToolCall, ToolText
from qoq.tools.reader import TextReader
from qoq.tools.request import ToolPlan

HERMES = "{% if tools %}<tool_call>{% endif %}"
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
STRICT = [{"type": "function", "function": {"name": "f", "strict": True}}]
TEXT = (
    'Hm, é.\n<tool_call>{"name": "f", "arguments": {"a": "é"}}</tool_call><tool_call>{"name": "g"}'
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("calling")
    added = {"<tool_call>": True, "</tool_call>": False, "[TOOL_CALLS]": True}
    write_byte_tokenizer(folder, added=added)
    return Tokenizer.load(folder)


def test_what_a_model_can_do(tokenizer: Tokenizer) -> None:
    def of(template: str | None, **options: Any) -> tuple[str | None, bool, list[str]]:
        made = ToolCalling.of_model(tokenizer, "llama", template=template, **options)
        return made.parser, made.auto, list(made.marks.values())

    assert of(HERMES) == ("hermes", True, ["<tool_call>"])  # the other one shows by itself
    assert of(HERMES, auto=False) == ("hermes", False, ["<tool_call>"])
    assert of(HERMES, parser="mistral", auto=True) == ("mistral", True, ["[TOOL_CALLS]"])
    assert of("{{ messages }}") == of(None) == (None, False, [])
    with pytest.raises(RequestError, match="--tool-call-parser"):
        of("{{ messages }}", auto=True)
    with pytest.raises(RequestError, match="auto, hermes, llama3_json, mistral"):
        of(HERMES, parser="nonsense")


def test_what_is_asked_of_the_engine(tokenizer: Tokenizer) -> None:
    calling = ToolCalling.of_model(tokenizer, "", template=HERMES)
    params = SamplingParams(max_tokens=3, stop="x")

    def shaped(tools: Any, choice: Any) -> SamplingParams:
        made = calling.shape(params, calling.plan(tools, choice))
        assert (made.max_tokens, made.stop) == (3, "x")
        return made

    assert shaped(TOOLS, "none") == params
    auto = shaped(TOOLS, None)
    assert (auto.structured_outputs, list(auto.shown_special_ids)) == (None, list(calling.marks))
    required = shaped(TOOLS, "required")
    assert required.structured_outputs is not None
    assert not required.shown_special_ids  # a forced call has no marks
    strict = shaped(STRICT, "auto")
    assert strict.structured_outputs is not None
    assert strict.shown_special_ids
    text, answer = StructuredOutputsParams(regex="a"), StructuredOutputsParams(json=True)
    params = SamplingParams(structured_outputs=text)
    plan = calling.plan(TOOLS, "auto", form=text)
    assert calling.shape(params, plan).structured_outputs == text
    plan = calling.plan(TOOLS, "auto", form=answer)
    assert plan.structure is not None
    assert plan.structure["structural_tag"]["otherwise"] == {}
    assert calling.plan(TOOLS, "none", form=answer) == ToolPlan()
    for tools, choice, form in (
        (TOOLS, "required", text),
        (TOOLS, "required", answer),
        (STRICT, "auto", text),
    ):
        with pytest.raises(RequestError, match="response_format") as caught:
            calling.plan(tools, choice, form=form)
        assert caught.value.param == "tools"
    off = ToolCalling.of_model(tokenizer, "", template=HERMES, auto=False)
    with pytest.raises(RequestError, match="--enable-auto-tool-choice"):
        off.plan(TOOLS, "auto")
    assert off.plan(TOOLS, "none") == off.plan(None, None) == ToolPlan()


def put_together(deltas: list[dict[str, Any]]) -> tuple[str, list[list[str]]]:
    """Content, and name and arguments of each call, as a client adds them up."""
    content, calls = "", []
    for delta in deltas:
        content += delta.get("content", "")
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                assert call["type"] == "function"
                calls.append([call["function"]["name"], call["function"]["arguments"]])
            else:
                calls[call["index"]][1] += call["function"]["arguments"]
    return content, calls


def test_deltas_wherever_the_text_is_cut(tokenizer: Tokenizer) -> None:
    calling = ToolCalling.of_model(tokenizer, "", template=HERMES)
    plan = calling.plan(TOOLS, "auto")
    wanted = ("Hm, é.", [["f", '{"a": "é"}'], ["g", "{}"]])
    for first in range(len(TEXT) + 1):
        for second in range(first, min(first + 12, len(TEXT)) + 1):
            reader, deltas = TextReader(plan), []
            for piece in (TEXT[:first], TEXT[first:second], TEXT[second:]):
                deltas += calling.deltas(reader.read(piece))
            deltas += calling.deltas(reader.read("", last=True))
            assert put_together(deltas) == wanted
            shown = "".join(delta.get("content", "") for delta in deltas)
            assert "<" not in shown


@pytest.mark.parametrize("seed", range(3))
def test_deltas_token_by_token(tokenizer: Tokenizer, seed: int) -> None:
    """As the engine makes them: a token at a time, marks as the special tokens they are."""
    from qoq.engine.request import Request

    calling = ToolCalling.of_model(tokenizer, "", template=HERMES)
    plan = calling.plan(TOOLS, "auto")
    params = calling.shape(SamplingParams(max_tokens=500, stop=["zz", "</to zz"][:seed]), plan)
    request = Request([5], params, max_length=500, tokenizer=tokenizer)
    reader, deltas = TextReader(plan), []
    for i in tokenizer.encode(TEXT, special=False):
        deltas += calling.deltas(reader.read(request.accept(i, 0.0)))
    deltas += calling.deltas(reader.read(request.fail(""), last=True))
    assert put_together(deltas) == ("Hm, é.", [["f", '{"a": "é"}'], ["g", "{}"]])


def test_messages(tokenizer: Tokenizer) -> None:
    calling = ToolCalling.of_model(tokenizer, "", template=HERMES)
    plain = calling.message(ToolText("hello"))
    assert plain == {"role": "assistant", "content": "hello", "refusal": None}
    assert calling.message(ToolText())["content"] == ""
    called = calling.message(ToolText("", [ToolCall("f", "{}"), ToolCall("f", '{"a')]))
    assert called["content"] is None
    first, second = called["tool_calls"]
    assert first["function"] == {"name": "f", "arguments": "{}"}
    assert second["function"]["arguments"] == '{"a'
    assert first["id"] != second["id"]
    assert first["id"].startswith("call_")
    json.dumps(called)


def test_ids_that_mistrals_templates_take(tokenizer: Tokenizer) -> None:
    calling = ToolCalling.of_model(tokenizer, "", template="[TOOL_CALLS]", auto=False)
    ids = {calling.new_id() for _ in range(50)}
    assert len(ids) == 50
    assert all(len(i) == 9 and i.isalnum() for i in ids)


def test_whose_fault_a_form_is(tmp_path: Path) -> None:
    bad = RequestError("structured_outputs: this json cannot be used: no such type")
    other = RequestError("The prompt is empty.")
    forced = ToolPlan("required", {"json": {}})
    blamed = blame_tools(bad, forced)
    assert (blamed.param, "no such type" in str(blamed)) == ("tools", True)
    assert blame_tools(other, forced) is other
    assert blame_tools(bad, ToolPlan("auto")) is bad
