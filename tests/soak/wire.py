"""HTTP by hand, so that a client can misbehave at every byte."""

import asyncio
import contextlib
import json
import socket
import struct
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What a server sent until it closed the connection."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Leave:
    """How a client hangs up: with ``sent`` of its message out (a share, or all of it), then after
    ``nbytes`` of the answer or ``seconds``, with a reset instead of a polite end if ``reset``.
    """

    sent: float = 1.0
    nbytes: int = 0
    seconds: float = 0.0
    reset: bool = False


def post(path: str, body: bytes, kind: str = "application/json", **headers: str) -> bytes:
    """A POST as bytes; ``headers`` add to the usual ones or take their place."""
    head = {
        "Host": "soak",
        "Connection": "close",
        "Content-Type": kind,
        "Content-Length": str(len(body)),
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    return f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode() + body


def get(path: str, method: str = "GET") -> bytes:
    """A request without a body, as bytes."""
    return f"{method} {path} HTTP/1.1\r\nHost: soak\r\nConnection: close\r\n\r\n".encode()


async def call(
    port: int, message: bytes, *, leave: Leave | None = None, seconds: float = 300.0
) -> Answer | None:
    """Send a message to this machine's ``port``; None where nothing came back, or we left first.

    Raises TimeoutError where the answer has not ended after ``seconds``.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    try:
        whole = leave is None or leave.sent >= 1
        with contextlib.suppress(ConnectionError):  # answers may come before we have said it all
            writer.write(message if leave is None else message[: int(len(message) * leave.sent)])
            if whole:
                await writer.drain()
        async with asyncio.timeout(seconds):
            if leave is None:
                return await _answer(reader)
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(leave.seconds):
                await reader.readexactly(leave.nbytes)
        return None
    except asyncio.IncompleteReadError:
        return None
    finally:
        if leave is not None and leave.reset:
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def _answer(reader: asyncio.StreamReader) -> Answer | None:
    try:
        data = await reader.read(-1)
    except ConnectionError:
        return None
    head, found, body = data.partition(b"\r\n\r\n")
    if not found:
        return None
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    if headers.get("transfer-encoding") == "chunked":
        body = _joined(body)
    return Answer(int(first.split()[1]), headers, body)


def _joined(chunks: bytes) -> bytes:
    """A chunked body in one piece; raises ValueError where its end is missing."""
    parts, rest = [], chunks
    while True:
        size, found, rest = rest.partition(b"\r\n")
        if not found:
            raise ValueError("a chunked body breaks off")
        length = int(size, 16)
        if length == 0:
            return b"".join(parts)
        parts.append(rest[:length])
        rest = rest[length + 2 :]
