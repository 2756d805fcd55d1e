"""Behind a real socket: hang-ups, death, and a process that drains on SIGTERM."""

import http.client
import json
import shutil
import signal
import socket
import ssl
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers import serving
from helpers.serving import process
from helpers.verbs import run
from qoq.engine.engine import Engine
from qoq.server.model import ServedModel

PATH = "/v1/completions"
LONG: dict[str, Any] = {"prompt": "hello", "max_tokens": 120, "ignore_eos": True}


def slow_steps(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    step = Engine.step

    def slow(self: Engine) -> Any:
        time.sleep(seconds)
        return step(self)

    monkeypatch.setattr(Engine, "step", slow)


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
@pytest.mark.parametrize("stream", [True, False])
def test_client_that_hangs_up_frees_its_pages(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch, route: str, stream: bool
) -> None:
    slow_steps(monkeypatch, 0.05)  # all 100 tokens would take five seconds
    body = {
        "/v1/completions": {"prompt": ["hello", "t"], "max_tokens": 100, "ignore_eos": True},
        "/v1/chat/completions": {
            "messages": [{"role": "user", "content": "a"}],
            "max_tokens": 100,
            "ignore_eos": True,
        },
        "/v1/responses": {"input": "a", "max_output_tokens": 100, "temperature": 2.0, "seed": 1},
    }[route]
    with serving.live(model) as server:
        start = time.monotonic()
        with httpx.Client(base_url=server.url, timeout=30) as http:
            if stream:
                with http.stream("POST", route, json={**body, "stream": True}) as answer:
                    assert answer.status_code == 200
                    next(answer.iter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    http.post(route, json=body, timeout=0.5)
        server.until_idle()
        assert time.monotonic() - start < 4.5
        text = server.context.engine.metrics.text().decode()
        assert 'request_success_total{finished_reason="length",model_name="tiny"} 0.0' in text


def test_client_that_leaves_within_its_body(model: ServedModel) -> None:
    with serving.live(model) as server:
        host, port = server.url.removeprefix("http://").split(":")
        for sent in (b"", b"POST /v1/completions HTTP/1.1\r\n"):
            socket.create_connection((host, int(port))).close()
            with socket.create_connection((host, int(port))) as sock:
                sock.sendall(sent)
        with socket.create_connection((host, int(port))) as sock:
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            sock.sendall(f"{head}Content-Length: 100\r\n\r\n".encode() + b'{"prompt')
        assert httpx.get(f"{server.url}/health").status_code == 200
        server.until_idle()


@pytest.mark.parametrize("refusal", [401, 413])
@pytest.mark.parametrize("chunked", [False, True])
def test_whoever_sends_too_much_is_told(model: ServedModel, refusal: int, chunked: bool) -> None:
    big = bytes(32 << 20)  # more than lies in the sockets between
    keys = ("key",) if refusal == 401 else ()
    with serving.live(model, api_keys=keys, max_request_bytes=1000) as server:
        client = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)
        body = iter([big]) if chunked else big
        headers = {"Content-Type": "application/json", "Connection": "close"}
        client.request("POST", PATH, body, headers, encode_chunked=chunked)
        assert client.getresponse().status == refusal
        client.close()


def test_small_pieces_of_a_stream_are_sent_at_once(model: ServedModel) -> None:
    with serving.live(model) as server, httpx.Client(base_url=server.url) as client:
        assert client.get("/health").status_code == 200
        [connection] = server.server.server_state.connections
        sock = connection.transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_death_of_the_engine_ends_the_server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = serving.load(folder)  # not the other tests' engine
    with monkeypatch.context() as patch, serving.live(model) as server:

        def broken(_: Engine) -> Any:
            raise MemoryError

        patch.setattr(Engine, "step", broken)
        got = httpx.post(server.url + PATH, json=LONG, timeout=30)
        assert got.status_code == 503
        server.thread.join(30)
        assert not server.thread.is_alive()
        assert server.server.status == 1


def test_sigterm_lets_open_requests_end(folder: Path) -> None:
    options = ("--shutdown-timeout", 60, "--served_model_name", "a", "b", "--max-num-seqs", 4)
    with process(folder, *options) as (child, url, lines):
        report = json.loads(lines[0])
        assert report["message"] == "start report"
        assert report["max_concurrency"] == 4.0
        assert report["kv_cache_tokens"] == 512
        assert report["ops"]["attention"]
        names = [m["id"] for m in httpx.get(f"{url}/v1/models").json()["data"]]
        assert names == ["a", "b"]
        body = {**LONG, "stream": True, "prompt": ["hello"] * 8}
        with httpx.stream("POST", url + PATH, json=body, timeout=60) as answer:
            events = answer.iter_lines()
            next(events)
            child.send_signal(signal.SIGTERM)
            data = [json.loads(e[6:]) for e in events if e.startswith("data: {")]
        ends = [e["choices"][0]["finish_reason"] for e in data if e["choices"][0]["finish_reason"]]
        assert ends == ["length"] * 8
        assert child.wait(30) == 0


def test_no_time_to_drain_and_ctrl_c(folder: Path) -> None:
    with process(folder) as (child, url, _):
        body = {**LONG, "stream": True, "prompt": ["hello"] * 40}
        with httpx.stream("POST", url + PATH, json=body, timeout=60) as answer:
            events = answer.iter_lines()
            next(events)
            child.send_signal(signal.SIGINT)
            data = [json.loads(e[6:]) for e in events if e.startswith("data: {")]
        assert data[-1]["error"]["code"] == "shutting_down"
        assert child.wait(30) == 130


def test_address_in_use_is_told_before_the_model_is_read(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("serve", tmp_path / "no-model", "--port", port, status=1)
    assert "in use" in result.stderr


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_tls(folder: Path, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    with process(folder, "--ssl-keyfile", key, "--ssl-certfile", certificate) as (_, url, _):
        assert url.startswith("https://")
        context = ssl.create_default_context(cafile=str(certificate))
        assert httpx.get(f"{url}/health", verify=context).status_code == 200
