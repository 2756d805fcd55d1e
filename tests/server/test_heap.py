"""Freed memory goes back to the system, and a server at rest sees to it."""

import asyncio
import ctypes
from typing import Any

import psutil
import pytest

from helpers.serving import client
from qoq.server import async_engine
from qoq.server.heap import return_free_memory
from qoq.server.model import ServedModel

PIECE = 64 << 10  # below what glibc takes from the system piece by piece


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_pages_between_pieces_in_use_are_given_back() -> None:
    def rss() -> int:
        return int(psutil.Process().memory_info().rss)

    pieces = [bytes([i % 251]) * PIECE for i in range(2000)]
    kept = pieces[::20]
    del pieces
    before = rss()
    return_free_memory()
    assert before - rss() > 1000 * PIECE
    assert len(kept) == 100


@pytest.mark.asyncio
async def test_once_for_each_rest(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[Any] = []
    monkeypatch.setattr(async_engine, "return_free_memory", lambda: times.append(1))
    monkeypatch.setattr(async_engine, "_RESTS_S", 0.2)
    async with client(model) as app:
        for rests in (1, 2):
            body = {"prompt": "hello", "max_tokens": 100, "ignore_eos": True}
            assert (await app.post("/v1/completions", body)).status_code == 200
            for _ in range(100):
                if len(times) >= rests:
                    break
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.5)
            assert len(times) == rests
