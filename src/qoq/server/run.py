"""Server: an app behind sockets until a signal, or the engine's death, ends it."""

import asyncio
import logging
import logging.config
import signal
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType

import uvicorn
from fastapi import FastAPI

from qoq.errors import RequestError
from qoq.server.async_engine import AsyncEngine
from qoq.server.logs import LogFormat, log_config
from qoq.server.settings import ServerSettings

_LOG = logging.getLogger("qoq.server")
_GOODBYE_S = 5.0  # beyond the drain, for last bytes to reach slow clients
DIED = 1
INTERRUPTED = 130


@dataclass(frozen=True)
class Transport:
    """How the app is reached; TLS where a key and a certificate are given."""

    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_ca_certs: str | None = None
    log_format: LogFormat = "text"
    log_level: str = "info"

    def check(self) -> None:
        """Raise RequestError for files that TLS cannot use."""
        if self.ssl_certfile is None:
            if self.ssl_keyfile or self.ssl_ca_certs:
                raise RequestError("TLS needs a certificate: give --ssl-certfile too.")
            return
        files = [f for f in (self.ssl_certfile, self.ssl_keyfile, self.ssl_ca_certs) if f]
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.ssl_certfile, self.ssl_keyfile)
            if self.ssl_ca_certs:
                context.load_verify_locations(self.ssl_ca_certs)
        except OSError as error:
            raise RequestError(f"TLS cannot use {', '.join(files)}: {error}.") from error

    @property
    def scheme(self) -> str:
        """http or https."""
        return "https" if self.ssl_certfile else "http"


def bind(host: str, port: int) -> socket.socket:
    """A socket that has its address but refuses connections until the server listens.

    Taken before a model is loaded, so that an address in use is told at once (RequestError).
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends without delay (TCP_NODELAY) only where the protocol is named; else the first
    # event of a stream waits for the headers to be acknowledged, which clients put off for 40 ms.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise RequestError(
            f"Cannot listen on {host}, port {port}: {error.strerror}. Choose another --host or "
            "--port."
        ) from error
    return sock


def configure_logs(form: LogFormat, level: str) -> None:
    """Send this process's logs to stderr in ``form``."""
    logging.config.dictConfig(log_config(form, level))


def make_server(app: FastAPI, settings: ServerSettings, transport: Transport) -> "Server":
    """A server for an app that ``create_app`` made; ``run(sockets=[...])`` serves until the end."""
    config = uvicorn.Config(
        app,
        log_config=log_config(transport.log_format, transport.log_level),
        access_log=False,  # our own line has the request's id
        ws="none",
        ssl_keyfile=transport.ssl_keyfile,
        ssl_certfile=transport.ssl_certfile,
        ssl_ca_certs=transport.ssl_ca_certs,
        server_header=False,
        timeout_graceful_shutdown=round(settings.shutdown_timeout + _GOODBYE_S),
    )
    return Server(config, app.state.context.engine, settings.shutdown_timeout, transport.scheme)


class Server(uvicorn.Server):
    """uvicorn's server: the engine's drain is in its shutdown, its death a reason for it."""

    def __init__(
        self, config: uvicorn.Config, engine: AsyncEngine, drain_seconds: float, scheme: str
    ) -> None:
        super().__init__(config)
        self._engine = engine
        self._drain_seconds = drain_seconds
        self._scheme = scheme
        self._interrupted = False
        self._signals = 0
        engine.on_death = self._stop

    @property
    def status(self) -> int:
        """The exit status: 0 after SIGTERM, 130 after Ctrl-C, 1 after the engine's death."""
        if self._engine.death is not None or not self.started:
            return DIED
        return INTERRUPTED if self._interrupted else 0

    def _stop(self) -> None:
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for address in _addresses(sockets or ()):
            _LOG.info("serving on %s://%s", self._scheme, address)

    @property
    def stuck(self) -> bool:
        """Whether the engine's thread has not ended; the process must then leave without it."""
        return self._engine.stuck

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """What is open has the drain's time while uvicorn takes nothing new."""
        if self._engine.death is not None:  # nothing to drain
            self.config.timeout_graceful_shutdown = round(_GOODBYE_S)
        draining = asyncio.create_task(self._drain())
        await super().shutdown(sockets)
        if not self.force_exit and not await draining:
            _LOG.warning("requests that were still open after the drain have been ended")

    async def _drain(self) -> bool:
        """Until open requests have ended, their time is over, or a second signal has come."""
        drain = asyncio.create_task(self._engine.drain(self._drain_seconds))
        while self._signals < 2 and not drain.done():
            await asyncio.wait((drain,), timeout=0.1)
        return await drain if drain.done() else await self._engine.drain(0)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second ends the drain, the third ends all at once.

        uvicorn would die of the signal again at the end; here it becomes the exit status.
        """
        self._signals += 1
        self._interrupted = sig == signal.SIGINT
        self.force_exit = self._signals > 2
        self.should_exit = True


def _addresses(sockets: Sequence[socket.socket]) -> list[str]:
    names = [sock.getsockname() for sock in sockets]
    return [f"[{n[0]}]:{n[1]}" if ":" in n[0] else f"{n[0]}:{n[1]}" for n in names]
