"""Strict functions: the model may answer in words; a call's arguments obey its schema."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from helpers.tiny import EOS, write_byte_tokenizer
from qoq.engine.structured import Grammars
from qoq.engine.structured_params import StructuredOutputsParams
from qoq.tokenizer import Tokenizer
from qoq.tools.parsers import parse
from qoq.tools.request import plan_tools

DAY = {
    "type": "object",
    "properties": {"day": {"$ref": "#/$defs/day"}},
    "required": ["day"],
    "additionalProperties": False,
    "$defs": {"day": {"enum": ["today", 'to"morrow']}},
}
TOOLS = [
    {"type": "function", "function": {"name": "plan", "parameters": DAY, "strict": True}},
    {"type": "function", "function": {"name": "planet", "parameters": DAY}},
]
STRICT, LOOSE = r'{"day": "to\"morrow"}', '{"moons": [1, {}]}'
# What each family writes: calls of the two functions, and what a call must not become.
TEXTS = {
    "hermes": (
        [
            '<tool_call>\n{"name": "plan", "arguments": %s}\n</tool_call>',
            '<tool_call>\n{"name": "planet", "arguments": %s}\n</tool_call>',
        ],
        ['<tool_call>\n{"name": "moon"', '<tool_call>\n{"name": "plan", "arguments": {"moons"'],
    ),
    "mistral": (
        [
            '[TOOL_CALLS][{"name": "plan", "arguments": %s}]',
            '[TOOL_CALLS] [{"name": "planet", "arguments": %s}]',
        ],
        ["[TOOL_CALLS]moon", '[TOOL_CALLS][{"name": "plan", "arguments": {"moons"'],
    ),
    "mistral, newer": (
        ["[TOOL_CALLS]plan[ARGS]%s", "[TOOL_CALLS]planet[ARGS]%s"],
        ['[TOOL_CALLS]plan[ARGS]{"moons"'],
    ),
    "llama3_json": (
        ['{"name": "plan", "parameters": %s}', '{"name": "planet", "parameters": %s}'],
        ['{"name": "moon"', ' {"name"', '{ "name"', '{"name": "plan", "parameters": {"moons"'],
    ),
}
WORDS = ["Hello.", "a <b> [c] {d}", '["a"]', '{"answer": 1}', 'is {"name": "x"} so?', ""]


@pytest.fixture(scope="module", params=[True, False], ids=["special", "text"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    """Marks are special tokens, or texts like any other."""
    folder = tmp_path_factory.mktemp("strict")
    write_byte_tokenizer(folder)
    made = Tokenizer.load(folder)
    if request.param:
        marks = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<think>")
        made.hf.add_tokens([AddedToken(mark, special=mark[0] == "[") for mark in marks])
        made.hf.save_pretrained(folder)
    return Tokenizer.load(folder)


def test_texts(tokenizer: Tokenizer) -> None:
    grammars = Grammars(tokenizer, len(tokenizer))
    for family, ((first, second), refused) in TEXTS.items():
        plan = plan_tools(TOOLS, parser=family.split(",")[0])
        assert plan.structure is not None
        assert plan.parser is not None

        def fits(text: str, structure: Any = plan.structure) -> bool:
            m = grammars.matcher(StructuredOutputsParams(**structure), [EOS])
            for i in [*tokenizer.encode(text, special=False), EOS]:
                if not m.allowed()[i]:
                    return False
                if i != EOS:
                    m.accept(i)
            return m.error is None

        for words in WORDS:
            assert fits(words), (family, words)
        for call, arguments in ((first, STRICT), (second, LOOSE)):
            text = call % arguments
            assert fits(text), (family, text)
            assert [c.arguments for c in parse(plan.parser(), text).calls] == [arguments]
        assert not fits(first % LOOSE)
        for text in refused:
            assert not fits(text), (family, text)


ANSWER = {"type": "object", "properties": {"say": {"$ref": "#/$defs/say"}}, "required": ["say"]}
ANSWER |= {"additionalProperties": False, "$defs": {"say": {"enum": ["yes"]}}}


def test_an_answer_with_a_schema(tokenizer: Tokenizer) -> None:
    grammars = Grammars(tokenizer, len(tokenizer))
    for family, ((first, second), _) in TEXTS.items():
        plan = plan_tools(TOOLS, parser=family.split(",")[0], answer=ANSWER)
        assert plan.structure is not None
        structure = StructuredOutputsParams(**plan.structure)
        good = ['{"say": "yes"}', first % STRICT, second % LOOSE]
        for text in [*good, "Hello.", '{"say": "no"', first % LOOSE]:
            m = grammars.matcher(structure, [EOS])
            for i in [*tokenizer.encode(text, special=False), EOS]:
                fits = bool(m.allowed()[i])
                if not fits or i == EOS:
                    break
                m.accept(i)
            assert m.error is None
            assert fits == (text in good), (family, text)
    assert plan_tools(TOOLS, "none", answer=ANSWER).structure is None  # the form itself is enough


def test_only_where_a_function_is_strict(tmp_path: Path) -> None:
    assert plan_tools(TOOLS[1:], parser="hermes").structure is None
    assert plan_tools(TOOLS, "none", parser="hermes").structure is None
    assert plan_tools(TOOLS).structure is None  # calls are not looked for
