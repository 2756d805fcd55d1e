"""background: a server in this process, on a thread of its own, for as long as a block lasts."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from qoq.errors import ServerError
from qoq.server.app import create_app
from qoq.server.context import Context
from qoq.server.model import ServedModel
from qoq.server.run import Server, Transport, bind, make_server
from qoq.server.settings import ServerSettings

_LOOK_S = 0.02


@dataclass(frozen=True)
class Background:
    """A server that runs beside its caller: its address, itself, what its routes share."""

    url: str
    server: Server
    context: Context
    thread: threading.Thread


@contextmanager
def background(model: ServedModel, settings: ServerSettings) -> Iterator[Background]:
    """Serve ``model`` on a free port of this machine until the block ends, by whatever way.

    Only warnings are logged. Raises ServerError where the server does not come up.
    """
    app = create_app(model, settings)
    server = make_server(app, settings, Transport(log_level="warning"))
    with bind("127.0.0.1", 0) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        # A daemon, so that a second Ctrl-C while it drains still ends the program.
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(_LOOK_S)
            if not server.started:
                raise ServerError("The server could not start; its log says why.", "connect")
            yield Background(url, server, app.state.context, thread)
        finally:
            server.should_exit = True
            thread.join()
