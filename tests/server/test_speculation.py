"""A server that guesses tokens: the answers of one that does not, several tokens at a time."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from helpers import serving
from helpers.packed import write_random_packed
from helpers.serving import Client
from qoq.engine.speculative import SpeculativeConfig

pytestmark = pytest.mark.asyncio(loop_scope="module")
PATH = "/v1/completions"
ASKED: list[dict[str, Any]] = [
    {"prompt": "hello hello hello", "temperature": 0},
    {"prompt": ["hello well hello well", "t"], "temperature": 0.3, "seed": 5, "n": 2},
    {"prompt": "the well the well", "temperature": 0, "stop": ["e", "ll"], "ignore_eos": False},
]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_packed(tmp_path_factory.mktemp("packed"))  # floats may differ by a bit


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def plain(packed: Path) -> AsyncIterator[Client]:
    async with serving.client(serving.load(packed)) as client:
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guessing(packed: Path) -> AsyncIterator[Client]:
    model = serving.load(packed, speculative=SpeculativeConfig(4))
    async with serving.client(model) as client:
        yield client


@pytest.mark.parametrize("asked", ASKED)
async def test_answers_and_streams_are_the_same(
    plain: Client, guessing: Client, asked: dict[str, Any]
) -> None:
    body = {"max_tokens": 50, "ignore_eos": True, "logprobs": 2, **asked}
    wanted = (await plain.post(PATH, body)).json()
    got = (await guessing.post(PATH, body)).json()
    assert got["choices"] == wanted["choices"]
    assert got["usage"]["completion_tokens"] == wanted["usage"]["completion_tokens"]
    events = await guessing.events(PATH, body)
    for text in wanted["choices"]:
        parts = [e["choices"][0] for e in events if e["choices"][0]["index"] == text["index"]]
        assert "".join(part["text"] for part in parts) == text["text"]
        told = [p for part in parts for p in part["logprobs"]["token_logprobs"]]
        assert told == text["logprobs"]["token_logprobs"]
        assert parts[-1]["finish_reason"] == text["finish_reason"]


async def test_guesses_are_counted(guessing: Client) -> None:
    new = await guessing.metric("generation_tokens_total")
    body = {"prompt": "hello hello hello", "max_tokens": 100, "temperature": 0, "ignore_eos": True}
    assert (await guessing.post(PATH, body)).status_code == 200
    drafted = await guessing.metric("spec_decode_num_draft_tokens_total")
    accepted = await guessing.metric("spec_decode_num_accepted_tokens_total")
    assert 0 < accepted < drafted
    drafts = await guessing.metric("spec_decode_num_drafts_total")
    assert 0 < drafts <= drafted
    assert await guessing.metric("generation_tokens_total") == new + 100
    assert (await guessing.post(PATH, {**body, "prompt": "a", "max_tokens": 2})).is_success
    assert await guessing.metric("spec_decode_num_drafts_total") == drafts


async def test_who_hangs_up_leaves_no_page(guessing: Client) -> None:
    body = {"prompt": ["hello hello"] * 8, "max_tokens": 100, "ignore_eos": True}
    for seconds in (0.02, 0.05, 0.1):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(seconds):
                await guessing.post(PATH, body)
        await guessing.until_idle()
