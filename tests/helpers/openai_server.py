"""A stand-in for an OpenAI-compatible server: it says the prompt's words back, token by token.

What a request's text says decides what happens to it: "boom" gets a 500, "busy" a 503, "torn" a
connection that breaks in the middle, "sour" an error event on the stream, "slow" 20 ms a token.
"""

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NO_TEMPLATE = "This model has no chat template; use /v1/completions."
METRICS = """\
# HELP qoq:num_requests_running Requests that run.
# TYPE qoq:num_requests_running gauge
qoq:num_requests_running{model_name="echo"} %d
qoq:num_requests_waiting{model_name="echo"} 0.0
qoq:kv_cache_usage_perc{model_name="echo"} 0.25
qoq:generation_tokens_total{model_name="echo"} %d
qoq:prompt_tokens_total{model_name="echo"} %d
qoq:prefix_cache_queries_total{model_name="echo"} 100.0
qoq:prefix_cache_hits_total{model_name="echo"} 40.0
qoq:spec_decode_num_draft_tokens_total{model_name="echo"} 2000.0
qoq:spec_decode_num_accepted_tokens_total{model_name="echo"} 500.0
qoq:cache_config_info{model_name="echo",kv_cache_size_tokens="4096"} 1.0
"""


@dataclass
class Echo:
    """A server's settings and what it has seen."""

    base_url: str = ""
    api_key: str | None = None
    template: bool = True
    delay: float = 0.0  # seconds per token
    usage: bool = True
    token: str | None = None  # said instead of the prompt's words
    pages: Mapping[str, tuple[bytes, dict[str, str]]] = field(default_factory=dict)
    metrics: str | None = METRICS
    bodies: list[dict[str, Any]] = field(default_factory=list)
    generated: int = 0
    hung_up: int = 0
    running: int = 0
    most_running: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def echo_server(**settings: Any) -> Iterator[Echo]:
    """A server on a free port of this machine until the block ends."""
    echo = Echo(**settings)

    class Handler(_Handler):
        state = echo

    server = _Server(("127.0.0.1", 0), Handler)
    echo.base_url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield echo
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    state: Echo
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        state = self.state
        page = state.pages.get(self.path.partition("?")[0])
        if page is not None:
            self._send(200, page[0], page[1])
        elif self.path == "/metrics" and state.metrics is not None:
            text = state.metrics
            if "%d" in text:
                text %= (state.running, state.generated, 10 * len(state.bodies))
            self._send(200, text.encode(), {"Content-Type": "text/plain"})
        elif self._locked():
            return
        elif self.path == "/v1/models":
            card = {"id": "echo", "object": "model", "max_model_len": 512, "scheme": "w4a8kv4-g128"}
            self._json(200, {"object": "list", "data": [card]})
        elif self.path == "/version":
            self._json(200, {"version": "1.2.3"})
        else:
            self._json(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._locked():
            return
        state = self.state
        state.bodies.append(body)
        chat = self.path == "/v1/chat/completions"
        said = body["messages"][-1]["content"] if chat else body["prompt"]
        if chat and not state.template:
            self._error(400, NO_TEMPLATE)
        elif "boom" in said:
            self._error(500, "something broke")
        elif "busy" in said:
            self._error(503, "queue full")
        else:
            with state.lock:
                state.running += 1
                state.most_running = max(state.most_running, state.running)
            try:
                self._stream(body, said, chat)
            except OSError:
                state.hung_up += 1
            finally:
                state.running -= 1

    def _stream(self, body: dict[str, Any], said: str, chat: bool) -> None:
        state = self.state
        words = said.split()
        limit = body.get("max_tokens") or len(words)
        # Without ignore_eos the answer ends with the prompt's words.
        count = limit if body.get("ignore_eos") else min(limit, len(words))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if chat:
            self._event(self._chunk({"role": "assistant", "content": ""}, chat, None))
        for i in range(count):
            time.sleep(state.delay + (0.02 if "slow" in said else 0))
            if i == 2 and "torn" in said:
                self.close_connection = True
                self.connection.close()
                return
            if i == 2 and "sour" in said:
                self._event({"error": {"message": "gone sour", "code": 500}})
                break
            text = f"{words[i % len(words)]} " if state.token is None else state.token
            state.generated += 1
            reason = None if i + 1 < count else "length" if count == limit else "stop"
            self._event(self._chunk({"content": text}, chat, reason))
        if state.usage and body.get("stream_options", {}).get("include_usage"):
            counts = {"prompt_tokens": len(words), "completion_tokens": count}
            self._event({"object": "chunk", "choices": [], "usage": counts})
        self._write(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _chunk(self, delta: dict[str, str], chat: bool, reason: str | None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason}
        choice |= {"delta": delta} if chat else {"text": delta.get("content", "")}
        return {"object": "chunk", "choices": [choice]}

    def _event(self, value: dict[str, Any]) -> None:
        self._write(b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n")

    def _write(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def _locked(self) -> bool:
        key = self.state.api_key
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return False
        self._error(401, "A valid API key is needed.")
        return True

    def _error(self, status: int, message: str) -> None:
        self._json(status, {"error": {"message": message, "type": "error", "code": status}})

    def _json(self, status: int, value: dict[str, Any]) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
