"""Lines of the batch format: what is refused, and how the rest is understood."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.calling import TEMPLATE, TOOLS, tool
from helpers.tiny import write_byte_tokenizer
from qoq.api.calling import ToolCalling
from qoq.api.logprobs import LogprobWriter
from qoq.batch.lines import (
    CHAT,
    COMPLETIONS,
    Asked,
    BadLine,
    Line,
    Model,
    answer,
    asked,
    line_id,
    malformed,
    read_line,
    refusal,
)
from qoq.engine.choices import choices
from qoq.engine.request import Logprob, Output, SamplingParams
from qoq.engine.structured_params import StructuredOutputsParams
from qoq.errors import RequestError
from qoq.tokenizer import Tokenizer

CONTEXT = 999
SAID = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("lines")
    write_byte_tokenizer(folder, template=TEMPLATE)
    tokenizer = Tokenizer.load(folder)
    tools = ToolCalling.of_model(tokenizer, "")
    defaults = {"top_k": 4, "temperature": 0.6}
    return Model("own", tokenizer, tools, defaults, CONTEXT, len(tokenizer))


def line(url: str = COMPLETIONS, **body: Any) -> Line:
    return Line("batch_req_1", "a", url, body)


GOOD = {"custom_id": "a", "method": "POST", "url": CHAT, "body": {}}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"custom_id": None}, None),
        ({"custom_id": 3}, None),
        ({"method": "GET"}, "a"),
        ({"url": "/v1/embeddings"}, "a"),
        ({"body": []}, "a"),
    ],
)
def test_bad_lines_are_named(change: dict[str, Any], named: str | None) -> None:
    with pytest.raises(BadLine, match="Line 7") as caught:
        read_line(7, json.dumps({**GOOD, **change}).encode())
    assert caught.value.custom_id == named
    told = malformed("x", caught.value)
    assert (told["id"], told["custom_id"], told["response"]) == ("x", named, None)
    assert "Line 7" in told["error"]["message"]


@given(st.binary(max_size=40))
def test_any_bytes_are_a_line_or_a_bad_one(raw: bytes) -> None:
    with pytest.raises(BadLine):
        read_line(1, raw)


def test_ids_hang_on_place_and_text() -> None:
    assert line_id(1, b"a") == line_id(1, b"a")
    assert len({line_id(1, b"a"), line_id(2, b"a"), line_id(1, b"b")}) == 3


def test_sampling_of_a_line(model: Model) -> None:
    def params(one: Line) -> SamplingParams:
        [only] = asked(one, model).params
        return only

    bare = Model(model.name, model.tokenizer, model.tools, {}, CONTEXT, model.vocab_size)
    [only] = asked(line(prompt="a"), bare).params
    assert only == SamplingParams(max_tokens=16, temperature=1.0, stop_token_ids=[])
    left = CONTEXT - len(asked(line(CHAT, messages=SAID), model).prompt)
    assert params(line(CHAT, messages=SAID)) == SamplingParams(left, 0.6, 4, stop_token_ids=[])
    got = params(
        line(
            CHAT,
            messages=SAID,
            temperature=0,
            max_completion_tokens=5,
            max_tokens=7,
            seed=3,
            stop="x",
            top_k=-1,
            n=1,
            stream=False,
            logprobs=None,
            user="me",
            tools=[],
        )
    )
    assert got == SamplingParams(5, 0, 0, seed=3, stop="x", stop_token_ids=[])
    form = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}
    many = asked(line(prompt="a", n=3, seed=5, logprobs=2, response_format=form), model).params
    wanted = SamplingParams(
        16,
        0.6,
        4,
        seed=5,
        n=3,
        logprobs=2,
        stop_token_ids=[],
        structured_outputs=StructuredOutputsParams(json={"type": "object"}),
    )
    assert many == choices(wanted)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": 3}, "logit_bias"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"stream": True}, "stream"),
        ({"echo": True}, "echo"),
        ({"truncate_prompt_tokens": CONTEXT}, "truncate_prompt_tokens"),
        ({"suffix": "a"}, "suffix"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": CONTEXT}, "max_tokens"),
        ({"prompt": [5] * CONTEXT}, "prompt"),
        ({"stop": [3]}, "stop"),
        ({"seed": 2**70}, "seed"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [1, True]}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": ["a"]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": SAID, "tools": [{}]}, "tools"),
        ({"messages": SAID, "tool_choice": "required"}, "tool_choice"),
        ({"messages": SAID, "functions": [{"name": "f"}]}, "functions"),
        ({"messages": SAID, "top_logprobs": 3}, "top_logprobs"),
    ],
)
def test_what_cannot_be_honoured_is_refused(body: dict[str, Any], param: str, model: Model) -> None:
    one = line(CHAT, **body) if "messages" in body else line(**{"prompt": "a", **body})
    with pytest.raises(RequestError) as caught:
        asked(one, model)
    told = refusal(one, caught.value)
    assert told["response"]["status_code"] == 400
    error = told["response"]["body"]["error"]
    assert (error["message"], error["param"]) == (str(caught.value), param)
    assert error["type"] == "invalid_request_error"


def test_prompts(model: Model) -> None:
    def text(one: Line) -> str:
        return model.tokenizer.decode(asked(one, model).prompt, skip_special=False)

    assert text(line(prompt="abc")) == text(line(prompt=["abc"])) == "abc"
    assert asked(line(prompt=[1, 2]), model).prompt == [1, 2]
    assert asked(line(prompt=[[1, 2]]), model).prompt == [1, 2]
    parts = [{"type": "text", "text": "ab"}, {"type": "text", "text": "c"}]
    said = [{"role": "user", "content": parts}, {"role": "assistant", "content": "x"}]
    assert text(line(CHAT, messages=said)) == "<|bos|>[user] ab\nc\n[assistant] x\n[assistant] "
    options = {"add_generation_prompt": False, "chat_template": "{{ x }}{{ messages | length }}"}
    given = line(CHAT, messages=said, chat_template_kwargs={"x": "!"}, **options)
    assert text(given) == "!2"
    assert asked(line(prompt=[1, 2, 3, 4], truncate_prompt_tokens=3), model).prompt == [2, 3, 4]
    tools = line(CHAT, messages=SAID, tools=[tool("f", strict=True)])
    assert '{"name": "f", "parameters": {"type": "object", "properties": {}}}' in text(tools)
    none = line(CHAT, messages=SAID, tools=TOOLS, tool_choice="none")
    assert text(none) == text(line(CHAT, messages=SAID))


def output(model: Model, text: str, **more: Any) -> Output:
    ids = model.tokenizer.encode(text, special=False)
    told = [{i: Logprob(-0.5, 1), 7: Logprob(-1.5, 2)} for i in ids]
    return Output(text, ids, [-0.5] * len(ids), "stop", [5], top_logprobs=told, **more)


def told(one: Asked, outputs: list[Output], model: Model) -> dict[str, Any]:
    made = answer(one, outputs, model, LogprobWriter(model.tokenizer))
    assert made["response"]["status_code"] == 200
    body = made["response"]["body"]
    json.dumps(body)
    assert isinstance(body, dict)
    return body


def test_texts_of_a_completion(model: Model) -> None:
    one = asked(line(prompt=[5], n=2, logprobs=1, prompt_logprobs=1), model)
    prompt = [None, {5: Logprob(-1.0, 3)}]
    body = told(one, [output(model, t, prompt_logprobs=prompt) for t in ("ab", "c")], model)
    assert (body["object"], body["model"]) == ("text_completion", "own")
    assert body["usage"] == {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}
    first, second = body["choices"]
    assert (first["text"], second["text"], second["index"]) == ("ab", "c", 1)
    assert first["logprobs"]["tokens"] == ["a", "b"]
    assert first["logprobs"]["top_logprobs"] == [{"a": -0.5}, {"b": -0.5}]
    assert first["prompt_logprobs"][1]["5"]["rank"] == 3
    plain = told(asked(line(prompt=[5], model="theirs"), model), [output(model, "ab")], model)
    assert (plain["choices"][0]["logprobs"], plain["model"]) == (None, "theirs")


def test_answers_of_a_chat(model: Model) -> None:
    call = '<tool_call>{"name": "now"}</tool_call>'
    body = {"messages": SAID, "logprobs": True, "top_logprobs": 2}
    [choice] = told(asked(line(CHAT, **body), model), [output(model, call)], model)["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (call, "stop")
    assert [len(entry["top_logprobs"]) for entry in choice["logprobs"]["content"]] == [2] * len(
        choice["logprobs"]["content"]
    )
    one = asked(line(CHAT, messages=SAID, tools=TOOLS), model)
    [choice] = told(one, [output(model, f"Hm.{call}")], model)["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Hm.", "tool_calls")
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "now", "arguments": "{}"}
    assert choice["logprobs"] is None
