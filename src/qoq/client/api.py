"""Endpoint: where an OpenAI-compatible server is, and streams of its answers."""

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx2

from qoq.client.answers import DONE, Piece, error_text, piece_of
from qoq.client.events import EventParser
from qoq.errors import ServerError

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class Endpoint:
    """A server's address (with or without /v1 at its end) and the key it may want."""

    base_url: str
    api_key: str | None = None

    def url(self, path: str) -> str:
        """The address of ``path``, which begins with /v1/... or is a route beside it."""
        return self.base_url.rstrip("/").removesuffix("/v1") + path

    @property
    def headers(self) -> dict[str, str]:
        """The key as bearer token, if there is one."""
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


def timeouts(seconds: float | None) -> httpx2.Timeout:
    """Give up when nothing arrives for ``seconds`` (None: never)."""
    return httpx2.Timeout(seconds, connect=CONNECT_SECONDS, pool=None)


def model_cards(endpoint: Endpoint) -> list[dict[str, Any]]:
    """What /v1/models lists: ``id``, and whatever else the server says. Raises ServerError."""
    try:
        answer = httpx2.get(
            endpoint.url("/v1/models"), headers=endpoint.headers, timeout=timeouts(30)
        )
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise _failed(endpoint, error) from error
    if answer.status_code != 200:
        raise _refused(endpoint, answer.status_code, answer.text)
    try:
        cards = answer.json()["data"]
        return [{**card, "id": str(card["id"])} for card in cards]
    except (ValueError, LookupError, TypeError) as error:
        raise _no_models(endpoint) from error


def first_model(endpoint: Endpoint) -> str:
    """The first name that /v1/models lists. Raises ServerError."""
    cards = model_cards(endpoint)
    if not cards:
        raise _no_models(endpoint)
    return str(cards[0]["id"])


def stream(
    endpoint: Endpoint, path: str, body: Mapping[str, Any], *, timeout: float | None = None
) -> Iterator[Piece]:
    """POST ``body`` with ``stream`` set and yield the answer as it comes. Raises ServerError.

    Closing the iterator hangs up, which ends the request on the server too.
    """
    try:
        with (
            httpx2.Client(timeout=timeouts(timeout)) as client,
            client.stream(
                "POST", endpoint.url(path), json=_streamed(body), headers=endpoint.headers
            ) as response,
        ):
            if response.status_code != 200:
                response.read()
                raise _refused(endpoint, response.status_code, response.text)
            reader = _Reader()
            for chunk in response.iter_bytes():
                yield from reader.push(chunk)
            reader.close()
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise _failed(endpoint, error) from error


async def stream_async(
    client: httpx2.AsyncClient, endpoint: Endpoint, path: str, body: Mapping[str, Any]
) -> AsyncIterator[Piece]:
    """``stream`` on an event loop, over a client that many requests share."""
    try:
        async with client.stream(
            "POST", endpoint.url(path), json=_streamed(body), headers=endpoint.headers
        ) as response:
            if response.status_code != 200:
                await response.aread()
                raise _refused(endpoint, response.status_code, response.text)
            reader = _Reader()
            async for chunk in response.aiter_bytes():
                for piece in reader.push(chunk):
                    yield piece
            reader.close()
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise _failed(endpoint, error) from error


class _Reader:
    """Chunks of bytes to pieces; knows whether the stream was complete."""

    def __init__(self) -> None:
        self._parser = EventParser()
        self._first = b""
        self._events = 0
        self._done = False

    def push(self, chunk: bytes) -> list[Piece]:
        self._first = self._first or chunk[:300]
        events = self._parser.push(chunk)
        self._events += len(events)
        pieces = []
        for data in events:
            if data.strip() == DONE:
                self._done = True
            elif not self._done:
                pieces.append(piece_of(data))
        return pieces

    def close(self) -> None:
        """Raise ServerError if the connection ended before the answer did."""
        if self._done:
            return
        if not self._events and _is_error(self._first):
            raise ServerError(error_text(self._first.decode("utf-8", "replace")), "stream_error")
        raise ServerError(
            "The server closed the connection in the middle of an answer.", "broken_stream"
        )


def _no_models(endpoint: Endpoint) -> ServerError:
    return ServerError(f"{endpoint.base_url} lists no models; name one with --model.", "bad_answer")


def _is_error(first: bytes) -> bool:
    """Whether what came instead of events is an error's JSON."""
    try:
        return "error" in json.loads(first)
    except (ValueError, TypeError):
        return False


def _streamed(body: Mapping[str, Any]) -> dict[str, Any]:
    return {**body, "stream": True, "stream_options": {"include_usage": True}}


def _refused(endpoint: Endpoint, status: int, text: str) -> ServerError:
    hint = " Give its key with --api-key." if status == 401 and not endpoint.api_key else ""
    return ServerError(
        f"{endpoint.base_url} answers {status}: {error_text(text)}{hint}", f"http_{status}"
    )


def _failed(endpoint: Endpoint, error: Exception) -> ServerError:
    where = endpoint.base_url
    if isinstance(error, httpx2.InvalidURL | httpx2.UnsupportedProtocol):
        return ServerError(f"{where} is no address such as http://127.0.0.1:8000.", "connect")
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
        return ServerError(
            f"No server answers at {where}; is it running, and is this its address?", "connect"
        )
    if isinstance(error, httpx2.TimeoutException):
        return ServerError(f"{where} sent nothing for too long.", "timeout")
    return ServerError(
        f"The connection to {where} broke: {error or type(error).__name__}.", "broken_stream"
    )
