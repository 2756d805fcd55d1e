"""The openai client against the bundled model, over a real socket."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pydantic
import pytest

from helpers import serving

BUNDLED = Path(__file__).parents[2] / "examples" / "books-llama"
TALK: list[openai.types.chat.ChatCompletionMessageParam] = [
    {"role": "user", "content": "It was a dark and"}
]


@pytest.fixture(scope="module")
def server() -> Iterator[serving.LiveServer]:
    model = serving.load(BUNDLED, max_num_seqs=16)
    with serving.live(model, served_model_names=("books",), api_keys=("key",)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: serving.LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="key", max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["books"]
    assert client.models.retrieve("books").owned_by == "qoq"


def test_chat(client: openai.OpenAI) -> None:
    got = client.chat.completions.create(
        model="books", messages=TALK, max_tokens=12, seed=3, n=2, logprobs=True
    )
    assert len(got.choices) == 2
    assert got.usage is not None
    assert got.usage.prompt_tokens_details is not None
    for choice in got.choices:
        assert choice.finish_reason in ("stop", "length")
        assert choice.message.content
        assert choice.logprobs is not None
        assert choice.logprobs.content
    again = client.chat.completions.create(model="books", messages=TALK, max_tokens=12, seed=3)
    assert again.choices[0].message.content == got.choices[0].message.content


def test_chat_stream(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model="books", messages=TALK, max_tokens=20, temperature=0
    )
    text, usage = "", None
    for chunk in client.chat.completions.create(
        model="books",
        messages=TALK,
        max_tokens=20,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
    assert text == whole.choices[0].message.content
    assert usage == whole.usage


def test_completions(client: openai.OpenAI) -> None:
    got = client.completions.create(
        model="books", prompt=["The", "It was"], max_tokens=5, echo=True, temperature=0
    )
    assert [c.text.startswith(p) for c, p in zip(got.choices, ("The", "It was"), strict=True)] == [
        True,
        True,
    ]
    stream = client.completions.create(model="books", prompt="The", max_tokens=5, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream)


def test_responses(client: openai.OpenAI) -> None:
    got = client.responses.create(
        model="books", input="It was a dark and", max_output_tokens=16, temperature=0
    )
    assert got.output_text
    assert got.usage is not None
    assert got.usage.output_tokens == 16
    with client.responses.stream(
        model="books", input="It was a dark and", max_output_tokens=16, temperature=0
    ) as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
    assert text == got.output_text


class Weather(pydantic.BaseModel):
    """What the answer is to hold."""

    wet: bool


def test_json_schema(client: openai.OpenAI) -> None:
    asked: Any = {"model": "books", "temperature": 0, "max_tokens": 1000, "messages": TALK}
    got = client.chat.completions.parse(**asked, response_format=Weather)
    assert isinstance(got.choices[0].message.parsed, Weather)
    with client.chat.completions.stream(**asked, response_format=Weather) as stream:
        streamed = stream.get_final_completion().choices[0].message.parsed
    assert streamed == got.choices[0].message.parsed
    response = client.responses.parse(
        model="books", input="It was", temperature=0, max_output_tokens=1000, text_format=Weather
    )
    assert isinstance(response.output_parsed, Weather)


def test_tools(client: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(Weather)
    asked: Any = {"model": "books", "temperature": 0, "max_tokens": 1000, "messages": TALK}
    got = client.chat.completions.parse(**asked, tools=[tool], tool_choice="required")
    [call] = got.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Weather)


def test_errors_become_the_clients_exceptions(
    client: openai.OpenAI, server: serving.LiveServer
) -> None:
    with pytest.raises(openai.NotFoundError, match="nope"):
        client.chat.completions.create(model="nope", messages=TALK)
    with pytest.raises(openai.BadRequestError, match="context is 2048") as caught:
        client.completions.create(model="books", prompt="the " * 5000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="--tool-call-parser"):
        client.chat.completions.create(
            model="books",
            messages=TALK,
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        )
    wrong = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        wrong.models.list()


def test_async_client(server: serving.LiveServer) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="key") as client:

            async def one(seed: int) -> str:
                stream = await client.chat.completions.create(
                    model="books", messages=TALK, max_tokens=8, seed=seed, stream=True
                )
                return "".join([c.choices[0].delta.content or "" async for c in stream])

            return list(await asyncio.gather(*map(one, range(6))))

    assert all(asyncio.run(ask()))
    server.until_idle()
