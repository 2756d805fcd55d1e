"""Keys, limits of bodies, ids and log lines."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest

from helpers.serving import client
from qoq.server.middleware import BodyLimits
from qoq.server.model import ServedModel

pytestmark = pytest.mark.asyncio
BODY = {"prompt": "a", "max_tokens": 1}


async def test_keys(model: ServedModel) -> None:
    async with client(model, api_keys=("one", "zwei-ü")) as app:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic one"},
            {"Authorization": "one"},
            {"Authorization": "Bearer "},
        ):
            got = await app.post("/v1/completions", BODY, headers=headers)
            assert got.status_code == 401, headers
            assert got.headers["www-authenticate"] == "Bearer"
            assert got.json()["error"]["code"] == "invalid_api_key"
        for path in ("/tokenizer_info", "/v1/models", "/nothing"):
            assert (await app.get(path)).status_code == 401
        for path in ("/health", "/ping", "/load", "/version", "/metrics", "/docs"):
            assert (await app.get(path)).status_code == 200
        for key in ("one", "zwei-ü"):
            headers = {b"Authorization": f"Bearer {key}".encode("latin-1")}
            answer = await app.http.get("/v1/models", headers=headers)
            assert answer.status_code == (200 if key == "one" else answer.status_code)


async def test_body_size(model: ServedModel) -> None:
    async with client(model, max_request_bytes=1000) as app:
        got = await app.post("/v1/completions", {"prompt": "a" * 2000})
        assert got.status_code == 413
        assert "1000 bytes" in got.json()["error"]["message"]

        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(30):
                yield b" " * 100

        headers = {"content-type": "application/json"}
        got = await app.http.post("/v1/completions", content=chunks(), headers=headers)
        assert got.status_code == 413
        assert (await app.post("/v1/completions", BODY)).status_code == 200


async def test_body_that_never_comes() -> None:
    sent: list[Any] = []

    async def never() -> Any:
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        sent.append(message)

    async def app(*_: Any) -> None:
        raise AssertionError("called without a body")

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    await BodyLimits(app, max_bytes=10, seconds=0.05)(scope, never, send)
    assert sent[0]["status"] == 408


async def test_request_ids_and_the_log(
    model: ServedModel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "qoq.access")
    async with client(model, api_keys=("secret",)) as app:
        headers = {"X-Request-Id": "my-id.1", "Authorization": "Bearer secret"}
        got = await app.post("/v1/completions", BODY, headers=headers)
        assert got.headers["x-request-id"] == "my-id.1"
        assert got.json()["id"] == "cmpl-my-id.1"
        facts = caplog.records[-1].facts  # type: ignore[attr-defined]
        assert facts["request_id"] == "my-id.1"
        assert (facts["status"], facts["prompt_tokens"], facts["completion_tokens"]) == (200, 1, 1)
        bad = await app.get("/health", headers={"X-Request-Id": "no spaces\there"})
        assert len(bad.headers["x-request-id"]) == 32
        refused = await app.get("/v1/models")
        assert refused.headers["x-request-id"]
        assert caplog.records[-1].facts["status"] == 401  # type: ignore[attr-defined]
    assert "secret" not in caplog.text


async def test_cors(model: ServedModel) -> None:
    origin = {"Origin": "https://page.example"}
    ask = {**origin, "Access-Control-Request-Method": "POST"}
    async with client(model, allowed_origins=("https://page.example",), api_keys=("k",)) as app:
        got = await app.http.options("/v1/completions", headers=ask)
        assert got.status_code == 200
        assert got.headers["access-control-allow-origin"] == "https://page.example"
        refused = await app.get("/v1/models", headers=origin)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://page.example"
    async with client(model) as app:
        got = await app.get("/health", headers=origin)
        assert "access-control-allow-origin" not in got.headers


async def test_a_bug_is_a_500_without_our_insides(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with client(model) as app:

        def broken(*_: Any) -> Any:
            raise ZeroDivisionError("inside")

        monkeypatch.setattr(type(app.context.prompts), "room", broken)
        got = await app.post("/v1/completions", BODY, headers={"X-Request-Id": "bug-7"})
        assert got.status_code == 500
        assert "inside" not in got.text
        assert got.headers["x-request-id"] == "bug-7"
        assert any(getattr(r, "facts", {}).get("request_id") == "bug-7" for r in caplog.records)
        assert "ZeroDivisionError" in caplog.text
