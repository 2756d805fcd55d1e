"""Fields beyond OpenAI's: priority, prompts cut short, stop strings kept, templates, logprobs."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from helpers import serving
from helpers.serving import Client
from qoq.api.protocol import (
    Body,
    ChatRequest,
    CompletionRequest,
    ResponsesRequest,
    TokenizeRequest,
)
from qoq.server.model import ServedModel

pytestmark = pytest.mark.asyncio(loop_scope="module")
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
TALK = [{"role": "user", "content": "hello"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}


async def choice(app: Client, path: str, **body: Any) -> dict[str, Any]:
    got = await app.post(path, {**GREEDY, **body})
    assert got.status_code == 200, got.text
    [one] = got.json()["choices"]
    assert isinstance(one, dict)
    return one


async def test_the_stop_string_can_stay(app: Client) -> None:
    whole = (await choice(app, TEXT, prompt="hello", max_tokens=40))["text"]
    stop = whole[12:14]
    end = whole.index(stop)
    cut = await choice(app, TEXT, prompt="hello", max_tokens=40, stop=stop)
    assert (cut["text"], cut["stop_reason"]) == (whole[:end], stop)
    kept = {"stop": stop, "include_stop_str_in_output": True}
    text = await choice(app, TEXT, prompt="hello", max_tokens=40, **kept)
    assert (text["text"], text["finish_reason"]) == (whole[: end + 2], "stop")
    chunks = await app.events(TEXT, {**GREEDY, "prompt": "hello", "max_tokens": 40, **kept})
    assert "".join(c["choices"][0]["text"] for c in chunks) == whole[: end + 2]
    assert [c["choices"][0]["stop_reason"] for c in chunks][-1] == stop
    every = list(range(app.context.prompts.vocab_size))
    asked = {"messages": TALK, "stop_token_ids": every, "include_stop_str_in_output": True}
    got = await choice(app, CHAT, **asked, return_token_ids=True)
    assert got["token_ids"] == [got["stop_reason"]]
    assert got["message"]["content"] == app.context.model.tokenizer.decode(got["token_ids"])


async def test_prompts_are_cut(app: Client, model: ServedModel) -> None:
    ids = model.tokenizer.encode("hello w abc tell abc", special=False)
    told = {"return_token_ids": True, "max_tokens": 3}
    for count, side, kept in (
        (4, None, ids[-4:]),
        (4, "left", ids[-4:]),
        (4, "right", ids[:4]),
        (100, None, ids),
        (-1, None, ids),
    ):
        for prompt in (ids, model.tokenizer.decode(ids)):
            asked = {"prompt": prompt, "truncate_prompt_tokens": count, "truncation_side": side}
            got = await choice(app, TEXT, **asked, **told)
            assert got["prompt_token_ids"] == kept
            assert got["text"] == (await choice(app, TEXT, prompt=kept, **told))["text"]
    long = {"prompt": "hello " * 1_000_000, "truncate_prompt_tokens": -1}
    start = time.monotonic()
    got = await choice(app, TEXT, **long, **told)
    assert len(got["prompt_token_ids"]) == 128 - 3
    assert time.monotonic() - start < 10
    echo = await choice(app, TEXT, prompt=ids, truncate_prompt_tokens=4, echo=True, **told)
    assert echo["text"].startswith(model.tokenizer.decode(ids[-4:]))
    talk = [{"role": "user", "content": "hello " * 50}]
    chat = await app.post(CHAT, {**GREEDY, "messages": talk, "truncate_prompt_tokens": 20})
    assert chat.json()["usage"]["prompt_tokens"] == 20


@pytest.mark.parametrize("count", [0, -2, 123, 2**70, "a"])
async def test_cuts_that_cannot_be(app: Client, count: Any) -> None:
    for path, prompt in ((TEXT, {"prompt": "a"}), (CHAT, {"messages": TALK})):
        got = await app.post(path, {**GREEDY, **prompt, "truncate_prompt_tokens": count})
        assert got.status_code == 400
        assert got.json()["error"]["param"] == "truncate_prompt_tokens"


async def test_logprobs_of_a_conversations_prompt(app: Client) -> None:
    body = {**GREEDY, "messages": TALK, "prompt_logprobs": 2}
    got = (await app.post(CHAT, body)).json()
    ids = (await app.post("/tokenize", {"messages": TALK})).json()["tokens"]
    text = await choice(app, TEXT, prompt=ids, prompt_logprobs=2)
    assert got["prompt_logprobs"] == text["prompt_logprobs"]
    assert len(got["prompt_logprobs"]) == len(ids)
    assert "prompt_logprobs" not in (await app.post(CHAT, {**body, "prompt_logprobs": None})).json()
    for change in ({"stream": True}, {"prompt_logprobs": 21}, {"prompt_logprobs": -1}):
        refused = await app.post(CHAT, {**body, **change})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "prompt_logprobs"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def trusting(model: ServedModel) -> AsyncIterator[Client]:
    settings: dict[str, Any] = {"trust_request_chat_template": True, "template_timeout": 1.0}
    async with serving.client(model, **settings) as client:
        yield client


async def test_a_request_may_bring_its_template(app: Client, trusting: Client) -> None:
    asked = {"messages": TALK, "chat_template": "{{ bos_token }}{{ messages[0].content }}!"}
    for path in (CHAT, "/tokenize"):
        got = await app.post(path, asked)
        assert got.status_code == 400
        assert got.json()["error"]["param"] == "chat_template"
        assert "--trust-request-chat-template" in got.json()["error"]["message"]
    ids = (await trusting.post("/tokenize", asked)).json()["tokens"]
    text = (await trusting.post("/detokenize", {"tokens": ids})).json()["prompt"]
    assert text == "<|bos|>hello!"
    told = await choice(trusting, CHAT, **asked)
    assert told["message"]["content"] == (await choice(trusting, TEXT, prompt=ids))["text"]
    for template in (
        "{{ 9 ** (9 ** 9) }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ unclosed",
        "{{ messages.__class__.__mro__ }}",
    ):
        bad = await trusting.post(CHAT, {**asked, "chat_template": template})
        assert bad.status_code == 400, template
    assert (await trusting.post(CHAT, {**GREEDY, "messages": TALK})).is_success


@pytest.mark.parametrize(
    ("path", "kind", "body"),
    [
        (TEXT, CompletionRequest, {"prompt": "hello"}),
        (CHAT, ChatRequest, {"messages": TALK}),
        ("/v1/responses", ResponsesRequest, {"input": "hello"}),
        ("/tokenize", TokenizeRequest, {"prompt": "hello"}),
    ],
)
async def test_null_is_the_same_as_nothing(
    app: Client, path: str, kind: type[Body], body: dict[str, Any]
) -> None:
    few = {"max_tokens": 3, "max_output_tokens": 3, "temperature": 0}
    nulls = dict.fromkeys(kind.model_fields.keys() - body.keys() - few.keys())
    got, plain = [(await app.post(path, {**few, **b, **body})).json() for b in (nulls, {})]
    for key in ("choices", "usage", "tokens"):
        assert got.get(key) == plain.get(key), got
    refused = await app.post(path, dict.fromkeys(body))
    assert refused.status_code == 400


async def test_the_ids_of_a_conversation(app: Client) -> None:
    ids = (await app.post("/tokenize", {"messages": TALK})).json()["tokens"]
    body = {**GREEDY, "messages": TALK, "return_token_ids": True}
    assert (await app.post(CHAT, body)).json()["prompt_token_ids"] == ids
    first, *rest = await app.events(CHAT, body)
    assert first["prompt_token_ids"] == ids
    assert rest
    assert not any("prompt_token_ids" in chunk for chunk in rest)
    assert (
        "prompt_token_ids" not in (await app.post(CHAT, {**body, "return_token_ids": None})).json()
    )


@pytest.mark.parametrize("path", [TEXT, CHAT, "/v1/responses"])
async def test_cached_prompts_are_shared_by_salt(app: Client, path: str) -> None:
    text = f"{path[-4:]} hat " * 9  # more than a page
    prompt = {
        TEXT: {"prompt": text, **GREEDY},
        CHAT: {"messages": [{"role": "user", "content": text}], **GREEDY},
        "/v1/responses": {"input": text, "max_output_tokens": 3},
    }[path]

    async def cached(**salt: str) -> int:
        usage = (await app.post(path, {**prompt, **salt})).json()["usage"]
        details = usage.get("prompt_tokens_details") or usage["input_tokens_details"]
        return int(details["cached_tokens"])

    assert await cached() == 0
    assert await cached() > 0
    assert await cached(cache_salt="mine") == 0
    assert await cached(cache_salt="mine") > 0
    assert await cached(cache_salt="yours") == 0


async def test_lower_priority_is_served_first(folder: Any) -> None:
    alone = serving.load(folder, max_num_seqs=1)
    async with serving.client(alone) as app:
        ended: list[str] = []

        async def ask(name: str, path: str, priority: int, **body: Any) -> None:
            got = await app.post(path, {**body, "priority": priority})
            assert got.status_code == 200, got.text
            ended.append(name)

        long = {**GREEDY, "max_tokens": 100}
        first = asyncio.create_task(ask("first", TEXT, -9, prompt="hello", **long))
        while not app.context.engine.stats.running:
            await asyncio.sleep(0.001)
        assert (await app.get("/load")).json() == {"server_load": 1}
        talk = {"messages": TALK, **GREEDY}
        later = [
            ("late", TEXT, 2**63 - 1, {"prompt": "a", **GREEDY}),
            ("last but one", CHAT, 3, talk),
            ("then", "/v1/responses", 1, {"input": "hello", "max_output_tokens": 3}),
            ("soon", TEXT, -3, {"prompt": "a", **GREEDY}),
        ]
        tasks = []
        for name, path, priority, body in later:
            tasks.append(asyncio.create_task(ask(name, path, priority, **body)))
            while app.context.engine.num_open <= len(tasks):
                await asyncio.sleep(0.001)
        await asyncio.gather(first, *tasks)
        assert ended == ["first", "soon", "then", "last but one", "late"]
        bad = await app.post(TEXT, {"prompt": "a", "priority": 2**63})
        assert bad.status_code == 400
        assert bad.json()["error"]["param"] == "priority"
