"""Servers for tests: an app to call in this process, or one behind a real socket in a thread."""

import asyncio
import json
import queue
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from helpers.verbs import spawn
from qoq.server.app import create_app
from qoq.server.background import Background, background
from qoq.server.context import Context
from qoq.server.model import EngineOptions, ServedModel, load_served_model
from qoq.server.settings import ServerSettings

NAME = "tiny"


def load(folder: Path, **options: Any) -> ServedModel:
    return load_served_model(folder, EngineOptions(**options))


@dataclass
class Client:
    """Calls an app without a network."""

    http: httpx.AsyncClient
    context: Context

    async def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        """``body`` may hold what strict JSON does not: NaN, lone surrogates."""
        return await self.send(path, json.dumps(body).encode(), **more)

    async def send(
        self, path: str, body: bytes, kind: str | None = "application/json", **more: Any
    ) -> httpx.Response:
        headers = {**({"content-type": kind} if kind else {}), **more.pop("headers", {})}
        return await self.http.post(path, content=body, headers=headers, **more)

    async def get(self, path: str, **more: Any) -> httpx.Response:
        return await self.http.get(path, **more)

    async def events(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The JSON of every event of a stream; [DONE] must be the last and is left out."""
        answer = await self.post(path, {**body, "stream": True})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        data = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
        assert data[-1] == "[DONE]"
        return [json.loads(item) for item in data[:-1]]

    async def metric(self, name: str, **labels: str) -> float:
        """The value of one of our metrics."""
        text = (await self.get("/metrics")).text
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        for line in text.splitlines():
            if line.startswith(f"qoq:{name}{{") and all(label in line for label in wanted):
                return float(line.rsplit(" ", 1)[1])
        raise AssertionError(f"no metric {name} {labels} in\n{text}")

    async def until_idle(self) -> None:
        """Wait until the engine holds nothing, then check that every page is free."""
        heard = asyncio.Event()
        engine = self.context.engine
        engine._post(lambda: engine._tell(heard.set))  # behind all that was asked so far
        await heard.wait()
        for _ in range(500):
            stats = self.context.engine.stats
            if not self.context.engine.num_open and not stats.running + stats.waiting:
                assert stats.kv_pages_used == 0
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"the engine still holds {self.context.engine.stats}")


@asynccontextmanager
async def client(model: ServedModel, **settings: Any) -> AsyncIterator[Client]:
    """An app over ``model``, started and stopped."""
    app = create_app(model, ServerSettings(**{"served_model_names": (NAME, "alias"), **settings}))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as http,
    ):
        yield Client(http, app.state.context)


class LiveServer(Background):
    """A server behind a socket of this machine."""

    def until_idle(self) -> None:
        """Wait until the engine holds nothing, then check that every page is free."""
        engine = self.context.engine
        for _ in range(500):
            stats = engine.stats
            if not engine.num_open and not stats.running + stats.waiting:
                assert stats.kv_pages_used == 0
                return
            time.sleep(0.01)
        raise AssertionError(f"the engine still holds {engine.stats}")


@contextmanager
def live(model: ServedModel, **settings: Any) -> Iterator[LiveServer]:
    """A running server, stopped at the end."""
    wanted = ServerSettings(**{"served_model_names": (NAME,), **settings})
    with background(model, wanted) as running:
        yield LiveServer(**vars(running))
    assert not running.thread.is_alive()


@contextmanager
def process(
    folder: Path, *options: object, fault: tuple[str, int] | None = None
) -> Iterator[tuple["subprocess.Popen[str]", str, list[str]]]:
    """``qoq serve`` in a process of its own: it, its address, its log as it grows.

    ``fault``: how the engine fails and at which step (``faulty_server``).
    """
    child = spawn("serve", folder, "--port", 0, "--log-format", "json", *options, fault=fault)
    lines: list[str] = []
    said: queue.Queue[str] = queue.Queue()

    def read() -> None:
        assert child.stderr is not None
        for line in child.stderr:
            lines.append(line)
            if '"message": "serving on ' in line:
                said.put(json.loads(line)["message"].removeprefix("serving on "))
        said.put("")

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        url = said.get(timeout=120)
        assert url, lines
        yield child, url, lines
    finally:
        child.kill()
        child.wait()
        reader.join(60)
        for pipe in (child.stdout, child.stderr):
            assert pipe is not None
            pipe.close()
