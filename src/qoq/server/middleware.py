"""What every request passes: an id and a line in the log, the key, the limits of its body.

Plain ASGI, not Starlette's BaseHTTPMiddleware, which hides a client's hang-up from streams.
"""

import asyncio
import contextlib
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qoq.server.errors import CLIENT_GONE, APIError, to_api_error

_LOG = logging.getLogger("qoq.access")
_ERRORS = logging.getLogger("qoq.server")
_GOOD_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
# Open to all: what balancers, dashboards and readers of the documentation ask for.
_OPEN_PATHS = (
    *("/health", "/ping", "/load", "/version", "/metrics"),
    *("/docs", "/redoc", "/openapi.json", "/"),
)
_OPEN_FOLDER = "/static/"  # of the page at /
_DROP_S = 10.0  # how long a refused request may go on sending


class RequestIds:
    """Gives each request an id (the client's X-Request-Id if it is sound) and a line in the log.

    An exception that nothing else has turned into an answer is a bug: it is logged under the id and
    becomes a 500 that says so.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _GOOD_ID.fullmatch(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        start, status, begun = time.monotonic(), CLIENT_GONE, False

        async def answer(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, answer)
        except Exception as error:
            _ERRORS.exception("a request has failed", extra={"facts": {"request_id": request_id}})
            if not begun:
                await to_api_error(error).response()(scope, receive, answer)
        finally:
            client = scope.get("client")
            facts = {
                "request_id": request_id,
                "client": client[0] if client else None,
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "seconds": round(time.monotonic() - start, 4),
                **state.get("facts", {}),
            }
            _LOG.info("%s %s %s", scope["method"], scope["path"], status, extra={"facts": facts})


class ApiKeys:
    """Lets in requests with one of the keys as bearer token."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], root_path: str = "") -> None:
        """Digests are compared in constant time, so that no answer tells how close a key is."""
        self._app = app
        self._digests = [_digest(key) for key in keys]
        self._root_path = root_path.rstrip("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._locked(scope) and not self._known(scope):
            message = "A valid API key is needed: send it as `Authorization: Bearer KEY`."
            error = APIError(401, message, code="invalid_api_key")
            await _drop_body(scope, receive)
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _locked(self, scope: Scope) -> bool:
        path = scope["path"].removeprefix(self._root_path) if self._root_path else scope["path"]
        # Browsers ask for permission (OPTIONS) before they send a key.
        is_open = path in _OPEN_PATHS or path.startswith(_OPEN_FOLDER)
        return scope["method"] != "OPTIONS" and not is_open

    def _known(self, scope: Scope) -> bool:
        kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return kind.lower() == "bearer" and any(matches)


async def _drop_body(scope: Scope, receive: Receive) -> None:
    """Read what a refused request still sends, and keep none of it.

    A socket that is closed over unread bytes is reset, and the answer is lost with them. Clients
    that ask before they send (``Expect``) are answered at once.
    """
    if "expect" in Headers(scope=scope):
        return
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DROP_S):
            while (await receive()).get("more_body", False):
                pass


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class BodyLimits:
    """Bodies must be JSON, of so many bytes at most, and here within so many seconds."""

    def __init__(self, app: ASGIApp, *, max_bytes: int, seconds: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
        except APIError as error:
            await error.response()(scope, receive, send)
            return
        if body is None:
            return  # the client hung up before it had said everything
        given = False

        async def replay() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        await self._app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body, None if the client left; APIError 408, 413 or 415."""
        headers = Headers(scope=scope)
        length = headers.get("content-length", "")
        if length.isdigit() and int(length[:20]) > self._max_bytes:
            await _drop_body(scope, receive)
            raise self._too_large()
        parts, size, more = [], 0, True
        try:
            async with asyncio.timeout(self._seconds):
                while more and size <= self._max_bytes:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    more = message.get("more_body", False)
        except TimeoutError:
            message_text = f"The body did not arrive within {self._seconds:g} s."
            raise APIError(408, message_text, code="timeout") from None
        if size > self._max_bytes:
            if more:
                await _drop_body(scope, receive)
            raise self._too_large()
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if size and kind != "application/json" and not kind.endswith("+json"):
            raise APIError(
                415,
                f"The content type must be application/json, not {kind[:80] or 'missing'!r}.",
                code="unsupported_media_type",
            )
        return b"".join(parts)

    def _too_large(self) -> APIError:
        return APIError(
            413,
            f"The body is larger than the {self._max_bytes} bytes this server accepts.",
            code="request_too_large",
        )
