"""Server-sent events: a generator of JSON objects as a response that never leaves it running."""

import logging
from collections.abc import AsyncGenerator
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from qoq.server.errors import to_api_error
from qoq.server.generation import Generation
from qoq.server.wire import dumps

_LOG = logging.getLogger("qoq.server")
# Characters that end a line for many clients (str.splitlines, httpx), though not by the standard.
_LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}
DONE = "data: [DONE]\n\n"
Events = AsyncGenerator[str, None]


def event(value: dict[str, Any], name: str | None = None) -> str:
    """One event; ``name`` where the client tells events apart by it."""
    data = dumps(value).translate(_LINE_ENDS)
    return f"event: {name}\ndata: {data}\n\n" if name else f"data: {data}\n\n"


class EventStream(StreamingResponse):
    """Sends events; whatever ends it (the last one, a hang-up, a shutdown) frees the generation."""

    def __init__(self, events: Events, generation: Generation, request_id: str) -> None:
        """An exception in ``events`` becomes a last event with the error, as the status is out."""
        self._events = events
        self._generation = generation
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(
            _guarded(events, request_id), media_type="text/event-stream", headers=headers
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.abort()
            await self._events.aclose()


async def _guarded(events: Events, request_id: str) -> Events:
    try:
        async for item in events:
            yield item
    except Exception as error:
        told = to_api_error(error)
        if told.status == 500:
            _LOG.exception("a stream has failed", extra={"facts": {"request_id": request_id}})
        yield event(told.body())
        yield DONE
