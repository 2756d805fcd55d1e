"""Tool calls: each family's way of writing them, whole and in any pieces."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qoq.tools.calls import CallStart, Content, ToolCall, collect
from qoq.tools.machine import Parser
from qoq.tools.parsers import PARSERS, CallList, Hermes, Llama3, Mistral, OneCall, parse

ARGS = '{"city": "Köln \\"}] ", "days": [1, {"a": null}]}'
WEATHER = f'{{"name": "weather", "arguments": {ARGS}}}'
CALL = ToolCall("weather", ARGS)
MAKERS = {**PARSERS, "list": CallList, "one": lambda: OneCall("f")}

CASES: list[tuple[type[Parser], str, str, list[ToolCall]]] = [
    (Hermes, "Just text. ", "Just text. ", []),
    (Hermes, f"<tool_call>\n{WEATHER}\n</tool_call>", "", [CALL]),
    (Hermes, f"Let me see.\n<tool_call>{WEATHER}</tool_call>\n", "Let me see.", [CALL]),
    (
        Hermes,
        f"<tool_call>{WEATHER}</tool_call>\n<tool_call>{WEATHER}</tool_call>",
        "",
        [CALL, CALL],
    ),
    (Hermes, f"<tool_call>{WEATHER}</tool_call> Done.", "Done.", [CALL]),
    (Hermes, f"<tool_call><tool_call>{WEATHER}</tool_call>", "<tool_call>", [CALL]),
    (Hermes, "a < b <tool_cal", "a < b <tool_cal", []),
    (Hermes, "a \n<tool_call>no json", "a \n<tool_call>no json", []),
    (Hermes, "<tool_call>no json</tool_call>", "<tool_call>no json</tool_call>", []),
    (Hermes, '<tool_call>{"nam', '<tool_call>{"nam', []),
    (Hermes, '<tool_call>{"name": "f", "arguments": {"a', "", [ToolCall("f", '{"a')]),
    (Hermes, '<tool_call>{"arguments": {"a": 1}, "name": "f"}', "", [ToolCall("f", '{"a": 1}')]),
    (Hermes, '<tool_call>{"name": "f"}</tool_call>', "", [ToolCall("f", "{}")]),
    (Hermes, '<tool_call>{"name": "f", "arguments": null}', "", [ToolCall("f", "{}")]),
    (
        Hermes,
        r'<tool_call>{"name": "f", "arguments": "{\"a\": 1}"}',
        "",
        [ToolCall("f", '{"a": 1}')],
    ),
    (Hermes, '<tool_call>{"name": 3, "x": {}}', '<tool_call>{"name": 3, "x": {}}', []),
    (Hermes, '<tool_call>{"name":}</tool_call>', '<tool_call>{"name":}</tool_call>', []),
    (
        Hermes,
        '<tool_call>{"id": 7, "name": "f", "arguments": {}, "parameters": {"b": 2}}</tool_call>',
        "",
        [ToolCall("f", "{}")],
    ),
    (Llama3, '{"name": "f", "parameters": {"a": 1}}', "", [ToolCall("f", '{"a": 1}')]),
    (Llama3, f"<|python_tag|>{WEATHER}; {WEATHER}", "", [CALL, CALL]),
    (Llama3, f" \n{WEATHER}", "", [CALL]),
    (Llama3, f"{WEATHER}\nThat is it.", "That is it.", [CALL]),
    (Llama3, f"{WEATHER}; and so on", "and so on", [CALL]),
    (Llama3, "Hello {you}", "Hello {you}", []),
    (Llama3, '{"answer": 42}', '{"answer": 42}', []),
    (Llama3, '{"name": "Bob", "age": 3} is he', '{"name": "Bob", "age": 3} is he', []),
    (Llama3, "<b>bold</b>", "<b>bold</b>", []),
    (Llama3, "<|python", "<|python", []),
    (Llama3, "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    (Mistral, f"[TOOL_CALLS][{WEATHER}]", "", [CALL]),
    (Mistral, f"[TOOL_CALLS] [{WEATHER}, {WEATHER}]", "", [CALL, CALL]),
    (Mistral, f"Well: [TOOL_CALLS]weather{ARGS}", "Well:", [CALL]),
    (Mistral, f"[TOOL_CALLS]weather[ARGS]{ARGS}[TOOL_CALLS]g{{}}", "", [CALL, ToolCall("g", "{}")]),
    (Mistral, "[TOOL_CALLS]?!\n", "[TOOL_CALLS]?!\n", []),
    (Mistral, "[1, 2] [TOOL", "[1, 2] [TOOL", []),
    (Mistral, "[TOOL_CALLS][1]", "[TOOL_CALLS][1]", []),
    (CallList, f"[{WEATHER} , {WEATHER}]", "", [CALL, CALL]),
    (CallList, f"[{WEATHER}, {{", "", [CALL]),
    (CallList, "oh", "oh", []),
]


@pytest.mark.parametrize(("parser", "text", "content", "calls"), CASES)
def test_texts(parser: type[Parser], text: str, content: str, calls: list[ToolCall]) -> None:
    found = parse(parser(), text)
    assert (found.content, found.calls) == (content, calls)


def in_pieces(parser: Parser, text: str, cuts: list[int]) -> Any:
    ends = sorted({min(c, len(text)) for c in cuts} | {0, len(text)})
    pieces = [text[a:b] for a, b in itertools.pairwise(ends)]
    return collect([*(e for p in pieces for e in parser.push(p)), *parser.finish()])


FRAGMENTS = st.sampled_from(
    [
        "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "{", "}", "[",
        "]", '"', "\\", ",", ":", ";", " ", "\n", "a", "é", '"name"', '"arguments"', "weather",
        '{"name": "f", "arguments": {"a": 1}}', WEATHER, "<", "null", "1",
    ]
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(MAKERS)),
    parts=st.lists(FRAGMENTS, max_size=12),
    cuts=st.lists(st.integers(0, 200), max_size=12),
)
def test_any_pieces_say_the_same(name: str, parts: list[str], cuts: list[int]) -> None:
    text = "".join(parts)
    whole = parse(MAKERS[name](), text)
    assert in_pieces(MAKERS[name](), text, cuts) == whole
    assert in_pieces(MAKERS[name](), text, list(range(len(text)))) == whole


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(
    calls=st.lists(
        st.tuples(
            st.text("abc_", min_size=1, max_size=8),
            st.dictionaries(st.text(max_size=5), json_values),
        ),
        min_size=1,
        max_size=3,
    ),
    before=st.text("ab. \n", max_size=8),
    indent=st.sampled_from([None, 1]),
    ascii_=st.booleans(),
)
def test_what_a_model_writes_comes_back(
    calls: list[tuple[str, dict[str, Any]]], before: str, indent: int | None, ascii_: bool
) -> None:
    def dump(value: Any) -> str:
        return json.dumps(value, indent=indent, ensure_ascii=ascii_)

    objects = [{"name": n, "arguments": a} for n, a in calls]
    written = {
        "hermes": before + "".join(f"<tool_call>\n{dump(o)}\n</tool_call>\n" for o in objects),
        "mistral": f"{before}[TOOL_CALLS]{dump(objects)}",
        "mistral, newer": before + "".join(f"[TOOL_CALLS]{n}{dump(a)}" for n, a in calls),
        "llama3_json": "; ".join(dump({"name": n, "parameters": a}) for n, a in calls),
        "list": dump(objects),
    }
    for name, text in written.items():
        found = parse(MAKERS[name.split(",")[0]](), text)
        assert [(c.name, json.loads(c.arguments)) for c in found.calls] == calls
        bare = name in ("llama3_json", "list")
        assert found.content.strip() == ("" if bare else before.strip())


def test_arguments_are_streamed_as_they_come() -> None:
    parser = Hermes()
    assert parser.push("Hi <tool") == [Content("Hi")]
    assert parser.push('_call>{"name": "f"') == []
    assert parser.push(', "arguments": {"a"')[0] == CallStart(0, "f")
    assert [e.text for e in parser.push(': "b') if hasattr(e, "text")] == [': "b']
    assert parser.push('"}}</tool_call>\n') != []
    assert parser.finish() == []


def test_long_and_hostile_texts_take_linear_time() -> None:
    import time

    start = time.process_time()
    long = json.dumps({"a": "x" * 200_000})
    assert (
        parse(Hermes(), f'<tool_call>{{"name": "f", "arguments": {long}}}').calls[0].arguments
        == long
    )
    parse(Hermes(), "<tool_call>" * 5_000)
    parse(Hermes(), '<tool_call>{"' * 2_000)
    parse(Mistral(), "[TOOL_CALLS]" * 5_000)
    parse(Llama3(), "[" * 50_000)
    assert time.process_time() - start < 20


def test_named_choice_is_all_arguments() -> None:
    found = parse(OneCall("f"), '{"a": 1}')
    assert (found.content, found.calls) == ("", [ToolCall("f", '{"a": 1}')])
