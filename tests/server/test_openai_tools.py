"""The openai client calls tools: over a real socket, with its own helpers."""

import asyncio
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest

from helpers import serving
from helpers.calling import TOOLS, led_to, obeys
from qoq.server.model import ServedModel

MODEL = "tiny"
TALK: list[Any] = [{"role": "user", "content": "What is the weather in Köln?"}]
ARGUMENTS = '{"city": "Köln", "days": 2, "unit": "C"}'
CALL = f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
FUNCTIONS: list[Any] = [{"type": "function", **tool["function"]} for tool in TOOLS]


@pytest.fixture(scope="module")
def server(caller: ServedModel) -> Iterator[serving.LiveServer]:
    with serving.live(caller) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: serving.LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def to_call(caller: ServedModel) -> dict[str, Any]:
    """What leads the model to say a little and call."""
    return led_to(f"I will look.\n{CALL}", caller.tokenizer)


def test_a_conversation_with_a_tool(client: openai.OpenAI, to_call: dict[str, Any]) -> None:
    got = client.chat.completions.create(
        model=MODEL, messages=TALK, tools=TOOLS, extra_body=to_call
    )
    [choice] = got.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I will look."
    assert choice.message.tool_calls
    [call] = choice.message.tool_calls
    assert call.type == "function"
    assert (call.function.name, call.function.arguments) == ("weather", ARGUMENTS)
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    again = client.chat.completions.create(
        model=MODEL, messages=[*TALK, choice.message, result], tools=TOOLS, max_tokens=5
    )
    assert again.usage
    assert got.usage
    assert again.usage.prompt_tokens > got.usage.prompt_tokens
    details = again.usage.prompt_tokens_details
    assert details
    assert details.cached_tokens  # the first turn is a prefix of the second


def test_stream_put_together_by_the_client(client: openai.OpenAI, to_call: dict[str, Any]) -> None:
    with client.chat.completions.stream(
        model=MODEL,
        messages=TALK,
        tools=TOOLS,
        extra_body=to_call,
        stream_options={"include_usage": True},
    ) as stream:
        kinds = [event.type for event in stream]
        got = stream.get_final_completion()
    [choice] = got.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I will look."
    assert choice.message.tool_calls
    [call] = choice.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("weather", ARGUMENTS)
    assert kinds.count("tool_calls.function.arguments.delta") > 5
    assert kinds.count("tool_calls.function.arguments.done") == 1
    assert got.usage
    assert got.usage.completion_tokens


def test_required_and_named_obey_the_schema(client: openai.OpenAI) -> None:
    for seed in range(3):
        got = client.chat.completions.create(
            model=MODEL,
            messages=TALK,
            tools=TOOLS[:1],
            tool_choice="required",
            parallel_tool_calls=False,
            seed=seed,
        )
        assert got.choices[0].finish_reason == "tool_calls"
        assert got.choices[0].message.content is None
        [call] = got.choices[0].message.tool_calls or []
        assert call.type == "function"
        assert obeys(call.function.arguments)
        got = client.chat.completions.create(
            model=MODEL,
            messages=TALK,
            tools=TOOLS,
            tool_choice={"type": "function", "function": {"name": "weather"}},
            seed=seed,
        )
        [call] = got.choices[0].message.tool_calls or []
        assert call.type == "function"
        assert obeys(call.function.arguments)


class Weather(pydantic.BaseModel):
    """Weather of a city."""

    city: str = pydantic.Field(max_length=9)
    unit: Literal["C", "F"]


def test_tools_and_answers_from_pydantic_models(client: openai.OpenAI) -> None:
    """The client makes strict tools of them, and reads arguments and answers back."""
    got = client.chat.completions.parse(
        model=MODEL,
        messages=TALK,
        tools=[openai.pydantic_function_tool(Weather)],
        tool_choice="required",
        parallel_tool_calls=False,
    )
    [call] = got.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Weather)
    answer = client.chat.completions.parse(model=MODEL, messages=TALK, response_format=Weather)
    assert isinstance(answer.choices[0].message.parsed, Weather)


def test_responses_with_a_tool(client: openai.OpenAI, to_call: dict[str, Any]) -> None:
    got = client.responses.create(model=MODEL, input=TALK, tools=FUNCTIONS, extra_body=to_call)
    message, call = got.output
    assert message.type == "message"
    assert got.output_text == "I will look."
    assert call.type == "function_call"
    assert (call.name, call.arguments) == ("weather", ARGUMENTS)
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    items: Any = [*TALK, *got.output, result]
    again = client.responses.create(model=MODEL, input=items, tools=FUNCTIONS, max_output_tokens=5)
    assert again.usage
    assert got.usage
    assert again.usage.input_tokens > got.usage.input_tokens


def test_responses_stream_put_together_by_the_client(
    client: openai.OpenAI, to_call: dict[str, Any]
) -> None:
    with client.responses.stream(
        model=MODEL, input=TALK, tools=FUNCTIONS, extra_body=to_call
    ) as stream:
        kinds = [event.type for event in stream]
        got = stream.get_final_response()
    assert kinds.count("response.function_call_arguments.delta") > 5
    message, call = got.output
    assert (got.output_text, message.type) == ("I will look.", "message")
    assert call.type == "function_call"
    assert (call.name, call.arguments) == ("weather", ARGUMENTS)
    named = client.responses.create(
        model=MODEL,
        input=TALK,
        tools=FUNCTIONS,
        tool_choice={"type": "function", "name": "weather"},
    )
    [only] = named.output
    assert only.type == "function_call"
    assert obeys(only.arguments)


def test_malformed_tools_become_the_clients_exceptions(client: openai.OpenAI) -> None:
    bad: list[tuple[Any, Any, str]] = [
        (TOOLS * 2, "auto", "two functions"),
        (TOOLS, {"type": "function", "function": {"name": "moon"}}, "'moon'"),
        ([{"type": "function", "function": {"name": "f", "parameters": 3}}], "auto", "schema"),
    ]
    for tools, choice, says in bad:
        with pytest.raises(openai.BadRequestError, match=says):
            client.chat.completions.create(
                model=MODEL, messages=TALK, tools=tools, tool_choice=choice
            )


def test_many_at_a_time(server: serving.LiveServer, to_call: dict[str, Any]) -> None:
    async def ask() -> list[str]:
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0) as client:

            async def one(seed: int) -> str:
                stream = await client.chat.completions.create(
                    model=MODEL,
                    messages=TALK,
                    tools=TOOLS,
                    extra_body=to_call,
                    stream=True,
                    seed=seed,
                )
                arguments = ""
                async for chunk in stream:
                    for call in chunk.choices[0].delta.tool_calls or ():
                        assert call.function
                        arguments += call.function.arguments or ""
                return arguments

            return list(await asyncio.gather(*map(one, range(6))))

    assert asyncio.run(ask()) == [ARGUMENTS] * 6
    server.until_idle()
