"""Tools in conversations: calls found, forced and streamed; what goes back; what is refused."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import serving
from helpers.calling import TOOLS, WEATHER, led_to, obeys, tool, write_calling_llama
from helpers.serving import Client
from qoq.server.model import ServedModel

pytestmark = pytest.mark.asyncio(loop_scope="module")
PATH = "/v1/chat/completions"
TALK = [{"role": "user", "content": "hello"}]
BODY: dict[str, Any] = {"messages": TALK, "tools": TOOLS, "max_tokens": 300, "seed": 1}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
ARGUMENTS = '{"city": "Köln"}'
# What the model writes; content and calls of the answer.
TEXTS: list[tuple[str, str | None, list[tuple[str, str]]]] = [
    ("Only words.", "Only words.", []),
    (CALL, None, [("weather", ARGUMENTS)]),
    (f"Let me see.\n{CALL}\n", "Let me see.", [("weather", ARGUMENTS)]),
    (
        f'{CALL}\n<tool_call>{{"name": "now"}}</tool_call>',
        None,
        [("weather", ARGUMENTS), ("now", "{}")],
    ),
    ("a < b <tool_cal", "a < b <tool_cal", []),
    # All of this call is known with the last token.
    ('<tool_call>{"name": "now"}', None, [("now", "{}")]),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def app(caller: ServedModel) -> AsyncIterator[Client]:
    async with serving.client(caller) as client:
        yield client


async def ask(app: Client, **body: Any) -> dict[str, Any]:
    got = await app.post(PATH, {**BODY, **body})
    assert got.status_code == 200, got.text
    value = got.json()
    assert isinstance(value, dict)
    return value


async def streamed(app: Client, **body: Any) -> tuple[list[dict[str, Any]], list[Any]]:
    """Messages put together from a stream, as its clients do it, and the reasons they ended for."""
    chunks = await app.events(PATH, {**BODY, **body})
    count = body.get("n", 1)
    messages: list[dict[str, Any]] = [{"content": "", "calls": []} for _ in range(count)]
    reasons: list[Any] = [None] * count
    for chunk in chunks:
        for choice in chunk["choices"]:
            message, delta = messages[choice["index"]], choice["delta"]
            assert reasons[choice["index"]] is None, "more after the end"
            reasons[choice["index"]] = choice["finish_reason"]
            message["content"] += delta.get("content") or ""
            for call in delta.get("tool_calls", []):
                if "id" in call:
                    assert call["index"] == len(message["calls"])
                    assert call["function"]["arguments"] == ""
                    message["calls"].append(call)
                else:
                    assert set(call) == {"index", "function"}
                    assert call["function"]["arguments"]
                    known = message["calls"][call["index"]]["function"]
                    known["arguments"] += call["function"]["arguments"]
    return messages, reasons


def leading(app: Client, text: str) -> dict[str, Any]:
    return led_to(text, app.context.model.tokenizer)


def calls_of(message: dict[str, Any]) -> list[tuple[str, str]]:
    calls = message.get("tool_calls") or message.get("calls") or []
    assert len({call["id"] for call in calls}) == len(calls)
    assert all(call["type"] == "function" for call in calls)
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def plain_app(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Client]:
    """A model to which the marks of calls are text like any other."""
    folder = tmp_path_factory.mktemp("plain")
    write_calling_llama(folder, marks=False)
    async with serving.client(serving.load(folder)) as client:
        yield client


@pytest.mark.parametrize("plain", [False, True], ids=["tokens", "text"])
@pytest.mark.parametrize(("text", "content", "calls"), TEXTS)
async def test_calls_are_found(
    app: Client,
    plain_app: Client,
    plain: bool,
    text: str,
    content: str | None,
    calls: list[tuple[str, str]],
) -> None:
    app = plain_app if plain else app
    led = leading(app, text)
    got = await ask(app, **led)
    [choice] = got["choices"]
    assert choice["message"]["content"] == content
    assert calls_of(choice["message"]) == calls
    assert ("tool_calls" in choice["message"]) == bool(calls)
    assert choice["finish_reason"] == ("tool_calls" if calls else "stop")
    [message], [reason] = await streamed(app, **led)
    assert message["content"] == (content or "")
    assert calls_of(message) == calls
    assert reason == choice["finish_reason"]
    ends = {"stream_options": {"include_usage": True}}
    last = (await app.events(PATH, {**BODY, **led, **ends}))[-1]
    assert last["usage"]["completion_tokens"] == got["usage"]["completion_tokens"] > 0


async def test_marks_that_lead_to_no_call_do_not_show(app: Client, caller: ServedModel) -> None:
    led = leading(app, "a <tool_call>no json</tool_call> b")
    got = await ask(app, **led)
    assert got["choices"][0]["message"]["content"] == "a no json b"
    [message], _ = await streamed(app, **led)
    assert message["content"] == "a no json b"
    shown = await ask(app, **led, tool_choice="none")
    assert shown["choices"][0]["message"]["content"] == "a no json b"
    raw = await ask(app, **led, tool_choice="none", skip_special_tokens=False)
    assert "<tool_call>" in raw["choices"][0]["message"]["content"]


async def test_a_call_that_is_cut_off(app: Client, caller: ServedModel) -> None:
    got = await ask(app, **leading(app, CALL), max_tokens=45)
    [choice] = got["choices"]
    [(name, arguments)] = calls_of(choice["message"])
    assert (name, choice["finish_reason"]) == ("weather", "length")
    assert ARGUMENTS.startswith(arguments)
    assert arguments != ARGUMENTS


async def test_one_call_only(app: Client) -> None:
    led = leading(app, f"{CALL}{CALL}")
    assert len(calls_of((await ask(app, **led))["choices"][0]["message"])) == 2
    one = await ask(app, **led, parallel_tool_calls=False)
    assert calls_of(one["choices"][0]["message"]) == [("weather", ARGUMENTS)]
    [message], _ = await streamed(app, **led, parallel_tool_calls=False)
    assert calls_of(message) == [("weather", ARGUMENTS)]


async def test_each_of_n_texts_has_its_own_calls(app: Client) -> None:
    got = await ask(app, **leading(app, CALL), n=3)
    found = [call for choice in got["choices"] for call in choice["message"]["tool_calls"]]
    assert len({call["id"] for call in found}) == 3
    messages, reasons = await streamed(app, **leading(app, CALL), n=3)
    assert [calls_of(m) for m in messages] == [[("weather", ARGUMENTS)]] * 3
    assert reasons == ["tool_calls"] * 3


async def test_logprobs_are_those_of_all_tokens(app: Client) -> None:
    body = {**leading(app, f"Hm. {CALL}"), "logprobs": True, "return_token_ids": True}
    got = (await ask(app, **body))["choices"][0]
    chunks = await app.events(PATH, {**BODY, **body})
    choices = [chunk["choices"][0] for chunk in chunks]
    told = [entry for c in choices for entry in (c["logprobs"] or {}).get("content", [])]
    assert told == got["logprobs"]["content"]
    assert [i for c in choices for i in c["token_ids"]] == got["token_ids"]
    assert len(told) == len(got["token_ids"])


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_a_call_that_is_required(app: Client, seed: int) -> None:
    body = {"tool_choice": "required", "temperature": 1.0, "seed": seed, "max_tokens": 200}
    [choice] = (await ask(app, **body))["choices"]
    assert choice["message"]["content"] is None
    calls = calls_of(choice["message"])
    if choice["finish_reason"] == "length":  # a random model may call for ever
        calls = calls[:-1]
    else:
        assert choice["finish_reason"] == "tool_calls"
        assert calls
    for name, arguments in calls:
        assert obeys(arguments) if name == "weather" else json.loads(arguments) is not None
    [message], _ = await streamed(app, **body)
    assert calls_of(message)[: len(calls)] == calls
    assert message["content"] == ""


@pytest.mark.parametrize("seed", range(3))
async def test_a_function_that_is_named(app: Client, seed: int) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    body = {"tool_choice": choice, "temperature": 1.0, "seed": seed}
    [got] = (await ask(app, **body))["choices"]
    [(name, arguments)] = calls_of(got["message"])
    assert name == "weather"
    assert obeys(arguments)
    assert got["finish_reason"] == "stop"  # as OpenAI has it
    [message], [reason] = await streamed(app, **body)
    assert (calls_of(message), reason) == ([(name, arguments)], "stop")


@pytest.mark.parametrize("seed", range(3))
async def test_a_strict_function_that_the_model_calls_by_itself(
    app: Client, caller: ServedModel, seed: int
) -> None:
    [mark] = caller.tokenizer.encode("<tool_call>", special=False)
    body = {
        "tools": [tool("weather", WEATHER, strict=True)],
        "logit_bias": {str(mark): 100},  # a random model would not think of it
        "parallel_tool_calls": False,
        "temperature": 1.0,
        "seed": seed,
    }
    [(name, arguments)] = calls_of((await ask(app, **body))["choices"][0]["message"])
    assert name == "weather"
    assert obeys(arguments)
    both = await app.post(PATH, {**BODY, **body, "structured_outputs": {"regex": "a"}})
    assert both.status_code == 400
    assert "response_format" in both.json()["error"]["message"]


@pytest.mark.parametrize("likes_calls", [True, False])
async def test_words_in_json_or_a_call(app: Client, caller: ServedModel, likes_calls: bool) -> None:
    [mark] = caller.tokenizer.encode("<tool_call>", special=False)
    schema = {"enum": ["ab", "cd"]}
    body = {
        "response_format": {"type": "json_schema", "json_schema": {"schema": schema}},
        "logit_bias": {str(mark): 100 if likes_calls else -100},
        "tools": [tool("weather", WEATHER, strict=True)],
        "parallel_tool_calls": False,
        "temperature": 1.0,
    }
    [choice] = (await ask(app, **body))["choices"]
    if likes_calls:
        [(name, arguments)] = calls_of(choice["message"])
        assert name == "weather"
        assert obeys(arguments)
    else:
        assert json.loads(choice["message"]["content"]) in ("ab", "cd")
        assert choice["finish_reason"] == "stop"


async def prompt_of(app: Client, messages: Any, **more: Any) -> str:
    """What the template makes of a conversation, and that a request is given the same."""
    asked = {"messages": messages, **more}
    ids = (await app.post("/tokenize", asked)).json()["tokens"]
    got = await app.post(PATH, {**asked, "max_tokens": 1})
    assert got.json()["usage"]["prompt_tokens"] == len(ids), got.text
    text = (await app.post("/detokenize", {"tokens": ids})).json()["prompt"]
    assert isinstance(text, str)
    return text


async def test_answers_go_back_and_results_with_them(app: Client) -> None:
    [choice] = (await ask(app, **leading(app, f"Hm. {CALL}")))["choices"]
    said = choice["message"]
    told = {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": "rain"}
    text = await prompt_of(app, [*TALK, said, told])
    key = told["tool_call_id"]
    # Templates are given arguments as objects, and write them as their model knows them.
    called = '{"name": "weather", "arguments": {"city": "Köln"}}'
    assert text == (
        f"<|bos|>[user] hello\n[assistant] Hm.<tool_call>{key} {called}</tool_call>\n"
        f"[tool {key}] rain\n[assistant] "
    )


@pytest.mark.parametrize("arguments", ['{"city": "K', "[1]", ""])
async def test_arguments_that_are_no_object_go_back_as_text(app: Client, arguments: str) -> None:
    said = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}],
    }
    shown = json.dumps(arguments) if arguments else "{}"
    assert f'{{"name": "f", "arguments": {shown}}}' in await prompt_of(app, [*TALK, said])


async def test_the_template_is_given_the_tools(app: Client) -> None:
    strict = [tool("weather", WEATHER, strict=True), TOOLS[1]]
    text = await prompt_of(app, TALK, tools=strict)
    shown = {"name": "weather", "parameters": WEATHER}
    assert f'<|bos|>{{"type": "function", "function": {json.dumps(shown)}}}\n' in text
    body = {"messages": TALK, "tools": TOOLS, "max_tokens": 1}
    without = (await app.post(PATH, {"messages": TALK, "max_tokens": 1})).json()["usage"]
    for choice, same in (("none", True), ("auto", False), ("required", False)):
        got = (await app.post(PATH, {**body, "tool_choice": choice})).json()["usage"]
        assert (got["prompt_tokens"] == without["prompt_tokens"]) == same


NAMED = {"type": "function", "function": {"name": "moon"}}
BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": [{"type": "retrieval"}]}, "tools", "type function"),
    ({"tools": [{"type": "function"}]}, "tools", "function is missing"),
    ({"tools": ["a"]}, "tools", "tools.0"),
    ({"tools": {"a": 1}}, "tools", "list"),
    ({"tools": [tool("")]}, "tools", "name"),
    ({"tools": [tool("a"), tool("b"), tool("a")]}, "tools", "'a'"),
    ({"tools": [tool("a", [1])]}, "tools", "JSON schema"),
    ({"tools": [tool(f"f{i}") for i in range(129)]}, "tools", "128"),
    ({"tool_choice": NAMED}, "tool_choice", "'moon'"),
    ({"tool_choice": "sometimes"}, "tool_choice", "must be"),
    ({"tool_choice": 3}, "tool_choice", ""),
    ({"tool_choice": "required", "tools": None}, "tool_choice", "tools is empty"),
    ({"tool_choice": "required", "tools": [tool("a", {"type": "foo"})]}, "tools", "foo"),
    ({"tools": [tool("a", {"type": "foo"}, strict=True)]}, "tools", "foo"),
    ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "tools", "response"),
    ({"functions": [{"name": "f"}]}, "functions", "use tools"),
    ({"function_call": {"name": "f"}}, "function_call", "use tool_choice"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages", "function"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": 3}}]}]},
        "messages",
        "name",
    ),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("change", "param", "says"), BAD)
async def test_refusals(
    app: Client, change: dict[str, Any], param: str, says: str, stream: bool
) -> None:
    got = await app.post(PATH, {**BODY, **change, "stream": stream})
    assert got.status_code == 400, got.text
    error = got.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param), error
    assert says in error["message"]


@pytest.mark.parametrize("choice", ["auto", "required"])
async def test_a_megabyte_of_schema(app: Client, model: ServedModel, choice: str) -> None:
    body = {**BODY, "tool_choice": choice, "max_tokens": 1}
    body["tools"] = [tool("a", {"type": "object", "description": "ab " * (1 << 19)})]
    got = await app.post(PATH, body)
    assert got.status_code == 400
    assert got.json()["error"]["code"] == "context_length_exceeded"
    async with serving.client(model) as other:  # its template does not show the tools
        got = await other.post(PATH, body)
        assert got.status_code == 400
        assert got.json()["error"]["param"] == ("tools" if choice == "required" else "tool_choice")


# A server decodes surrogates from JSON's escapes, so they may be anywhere.
TEXT = st.text(max_size=6) | st.sampled_from(["\ud800", "f", "object", "string", "#/$defs/f"])
KEYS = st.sampled_from(
    ["type", "function", "name", "parameters", "strict", "properties", "$defs", "$ref", "items"]
)
ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | TEXT | st.just("function"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | TEXT, inner, max_size=4),
    max_leaves=8,
)
FUNCTION = st.fixed_dictionaries(
    {"name": TEXT, "parameters": ANY}, optional={"strict": st.booleans(), "description": ANY}
)
SOME_TOOLS = st.lists(
    st.fixed_dictionaries({"type": st.just("function"), "function": FUNCTION}) | ANY, max_size=3
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    tools=SOME_TOOLS,
    choice=st.sampled_from(["auto", "required", "none"])
    | st.fixed_dictionaries({"type": st.just("function"), "function": FUNCTION})
    | ANY,
    calls=st.lists(ANY, max_size=2) | st.none(),
    stream=st.booleans(),
)
async def test_whatever_tools_are_there_is_an_answer(
    app: Client, tools: Any, choice: Any, calls: Any, stream: bool
) -> None:
    talk = [*TALK, {"role": "assistant", "tool_calls": calls}]
    body = {"messages": talk, "tools": tools, "tool_choice": choice, "max_tokens": 2}
    got = await app.post(PATH, {**body, "stream": stream})
    assert got.status_code in (200, 400), got.text
    if stream and got.status_code == 200:
        assert got.text.endswith("data: [DONE]\n\n")
        assert '"error"' not in got.text
    functions = [{"type": "function", **t["function"]} for t in tools if _is_function(t)]
    flat = {"input": "a", "tools": functions, "tool_choice": choice, "max_output_tokens": 2}
    got = await app.post("/v1/responses", {**flat, "stream": stream})
    assert got.status_code in (200, 400), got.text


def _is_function(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("function"), dict)


async def test_deep_tools_are_refused(app: Client) -> None:
    for levels in (200, 900, 5000):
        schema = '{"properties": {"a": ' * levels + "{}" + "}}" * levels
        body = json.dumps({**BODY, "tools": [tool("a", {"x": 1})]})
        got = await app.send(PATH, body.replace('{"x": 1}', schema).encode())
        assert got.status_code == 400, (levels, got.text[:200])
    assert (await app.post(PATH, {**BODY, "max_tokens": 1})).status_code == 200


async def test_without_automatic_choice(caller: ServedModel) -> None:
    off = serving.load(caller.path, enable_auto_tool_choice=False)
    async with serving.client(off) as app:
        for choice in ({}, {"tool_choice": "auto"}):
            got = await app.post(PATH, {**BODY, **choice})
            assert got.status_code == 400
            assert "--enable-auto-tool-choice" in got.json()["error"]["message"]
        named = {"tool_choice": {"type": "function", "function": {"name": "weather"}}}
        assert calls_of((await ask(app, **named))["choices"][0]["message"])
