"""A KV cache far too small: requests throw each other out, and each gets what it gets alone."""

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pytest

from helpers import serving
from helpers.packed import write_random_packed
from helpers.serving import Client, client
from qoq.server.model import ServedModel

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(600)]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_packed(tmp_path_factory.mktemp("packed"), context=512)


@pytest.fixture
def cramped(packed: Path) -> ServedModel:
    """Eight requests may run; there are pages for the longest alone, and one more."""
    shape = serving.load(packed).pool
    page = shape.nbytes // shape.num_pages
    return serving.load(
        packed, max_num_seqs=8, max_num_batched_tokens=100, kv_memory_bytes=9 * page
    )


def drawn(count: int) -> list[tuple[str, dict[str, Any]]]:
    """Requests that outgrow the pages they are let in with."""
    rng = random.Random(7)
    asks: list[tuple[str, dict[str, Any]]] = []
    for i in range(count):
        prompt = [rng.randrange(3, 250) for _ in range(rng.choice((1, 20, 40, 60, 63, 200)))]
        body: dict[str, Any] = {
            "max_tokens": rng.randint(100, 250),
            "ignore_eos": True,
            "temperature": rng.choice((0, 1.0)),
            "seed": i,
            "logprobs": 3,
            "stream": i % 2 == 0,
        }
        body |= rng.choice(
            (
                {},
                {"n": 2},
                {"repetition_penalty": 1.3, "presence_penalty": 0.5},
                {"guided_regex": "[a-f ]{150,200}"},
                {"top_p": 0.8, "min_tokens": 20, "logit_bias": {"77": 4}},
            )
        )
        if i % 4 == 3:
            talk = [{"role": "user", "content": "hello " * rng.randint(1, 20)}]
            body |= {"messages": talk, "logprobs": True, "top_logprobs": 2}
            asks.append((CHAT, body))
        else:
            asks.append((COMPLETIONS, {**body, "prompt": prompt}))
    return asks


async def answer(app: Client, path: str, body: dict[str, Any]) -> list[Any]:
    """Per text: its pieces joined, every token with its logprobs, why it ended."""
    if not body["stream"]:
        got = await app.post(path, body)
        assert got.status_code == 200, got.text
        choices = got.json()["choices"]
        texts = [c["text"] if "text" in c else c["message"]["content"] for c in choices]
        parts = [
            (text, [_flat(c["logprobs"])], c["finish_reason"])
            for text, c in zip(texts, choices, strict=True)
        ]
        return [json.dumps(part) for part in parts]
    found: dict[int, tuple[str, list[Any], str | None]] = {}
    for event in await app.events(path, body):
        for c in event["choices"]:
            piece = c["text"] if "text" in c else c["delta"].get("content") or ""
            text, told, _ = found.get(c["index"], ("", [], None))
            more = [_flat(c["logprobs"])] if c["logprobs"] else []
            found[c["index"]] = (text + piece, told + more, c["finish_reason"])
    joined = [
        (text, [[x for part in told for x in part]], end)
        for _, (text, told, end) in sorted(found.items())
    ]
    return [json.dumps(part) for part in joined]


def _flat(logprobs: dict[str, Any]) -> list[Any]:
    if "content" in logprobs:
        return [
            (t["logprob"], [top["logprob"] for top in t["top_logprobs"]])
            for t in logprobs["content"]
        ]
    return list(zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True))


async def test_every_answer_is_the_one_it_gets_alone(packed: Path, cramped: ServedModel) -> None:
    asks = drawn(24)
    async with client(serving.load(packed, max_num_seqs=1)) as app:
        alone = [await answer(app, path, body) for path, body in asks]
    assert len({text for texts in alone for text in texts}) > len(asks)
    async with client(cramped) as app:
        together = await asyncio.gather(*(answer(app, path, body) for path, body in asks))
        await app.until_idle()
        assert await app.metric("num_preemptions_total") > len(asks) / 2
    for ask, one, other in zip(asks, alone, together, strict=True):
        assert one == other, ask


async def test_clients_that_leave_while_all_are_thrown_out(cramped: ServedModel) -> None:
    asks = drawn(24)
    async with client(cramped) as app:
        tasks = [asyncio.create_task(answer(app, path, body)) for path, body in asks]
        for task in tasks[::3]:
            await asyncio.sleep(0.1)
            task.cancel()
        kept = [task for i, task in enumerate(tasks) if i % 3]
        await asyncio.gather(*kept)
        await asyncio.gather(*tasks, return_exceptions=True)
        await app.until_idle()
        assert await app.metric("num_preemptions_total") > 0
        assert [await answer(app, *asks[1])] == [await tasks[1]]
