"""TextReader: what a plan makes of a text, and marks that are no content."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qoq.tools.calls import ToolCall, ToolText, collect
from qoq.tools.parsers import PARSERS, parse
from qoq.tools.reader import TextReader
from qoq.tools.request import ToolPlan, plan_tools

TOOLS = [{"type": "function", "function": {"name": "f"}}]
FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>"),
    *("a", " ", "{", "}", "[", "]", '"', ":", '{"name": "f", "parameters": {}}', "<", "f"),
]
TWO = 'Hm.<tool_call>{"name": "f"}</tool_call><tool_call>{"name": "g"}</tool_call> Done.'


def read(plan: ToolPlan, text: str, reason: str = "stop") -> tuple[ToolText, str | None]:
    reader = TextReader(plan)
    found = collect([*reader.read(text[:9]), *reader.read(text[9:], last=True)])
    return found, reader.finish_reason(reason)


def test_calls_end_a_text_unless_it_was_cut_off() -> None:
    auto = plan_tools(TOOLS, parser="hermes")
    calls = [ToolCall("f", "{}"), ToolCall("g", "{}")]
    assert read(auto, TWO) == (ToolText("Hm.Done.", calls), "tool_calls")
    assert read(auto, TWO, "length")[1] == "length"
    assert read(auto, "Only words.") == (ToolText("Only words."), "stop")
    one = plan_tools(TOOLS, parser="hermes", parallel=False)
    assert read(one, TWO)[0] == ToolText("Hm.Done.", calls[:1])
    assert read(plan_tools(TOOLS, "none", parser="hermes"), TWO) == (ToolText(TWO), "stop")
    required = plan_tools(TOOLS, "required")
    assert read(required, '[{"name": "f", "parameters": {}}]')[1] == "tool_calls"
    named = plan_tools(TOOLS, {"type": "function", "function": {"name": "f"}})
    assert read(named, '{"a": 1}') == (ToolText("", [ToolCall("f", '{"a": 1}')]), "stop")


@pytest.mark.parametrize(
    ("name", "text", "content"),
    [
        ("hermes", "a <tool_call>no json</tool_call> b", "a no json b"),
        ("hermes", "a</tool_call>b <tool_call>", "ab "),
        ("hermes", '<tool_call><tool_call>{"name": "f"}</tool_call>', ""),
        ("hermes", 'a</tool_call>{"name": "f"}', 'a{"name": "f"}'),
        ("mistral", "well [TOOL_CALLS]?!\n", "well ?!\n"),
        ("mistral", "a[ARGS][CALL_ID]b", "ab"),
        ("mistral", "a [TOOL_CALLS]", "a "),
        ("llama3_json", "<|python_tag|>print(1)", "print(1)"),
        ("llama3_json", "a <|python_tag|> b <|python_tag|>", "a  b "),
        ("llama3_json", "<|python_tag|>", ""),
        ("llama3_json", '<|python_tag|>{"answer": 1}', '{"answer": 1}'),
    ],
)
def test_special_tokens_are_never_content(name: str, text: str, content: str) -> None:
    maker = PARSERS[name]
    assert parse(maker(maker.tokens), text).content == content
    parser = maker(maker.tokens)
    shown = collect(event for char in text for event in parser.push(char)).content
    assert content.startswith(shown)


@given(
    name=st.sampled_from(sorted(PARSERS)),
    parts=st.lists(
        st.sampled_from(FRAGMENTS),
        max_size=10,
    ),
    cuts=st.lists(st.integers(0, 120), max_size=8),
)
def test_hidden_marks_in_any_pieces(name: str, parts: list[str], cuts: list[int]) -> None:
    maker, text = PARSERS[name], "".join(parts)
    parser = maker(maker.tokens)
    ends = sorted({min(c, len(text)) for c in cuts} | {0, len(text)})
    events = [e for a, b in itertools.pairwise(ends) for e in parser.push(text[a:b])]
    found = collect([*events, *parser.finish()])
    assert found == parse(maker(maker.tokens), text)
    assert not any(mark in found.content for mark in maker.tokens)
    if not any(mark in text for mark in maker.tokens):
        assert found == parse(maker(), text)


def test_an_id_between_name_and_arguments() -> None:
    text = '[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{"a": 1}[TOOL_CALLS]g[ARGS]{}'
    for hidden in ((), PARSERS["mistral"].tokens):
        assert parse(PARSERS["mistral"](hidden), text).calls == [
            ToolCall("f", '{"a": 1}'),
            ToolCall("g", "{}"),
        ]
