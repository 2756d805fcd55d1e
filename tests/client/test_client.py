"""Events out of bytes, pieces out of chunks, and what is said when a server fails."""

import asyncio
import json

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.openai_server import echo_server
from qoq.client.answers import Piece, error_text, piece_of
from qoq.client.api import CHAT, COMPLETIONS, Endpoint, first_model, stream, stream_async
from qoq.client.events import EventParser
from qoq.errors import ServerError

# What str.splitlines would take for ends of lines, and a code point of four bytes.
TEXTS = ["a", "x\u2028y", "\x0b\x0c\x1c\x85", "\U0001f600", "data: no", ""]


@given(st.data())
def test_events_survive_any_cut(data: st.DataObject) -> None:
    texts = data.draw(st.lists(st.sampled_from(TEXTS), max_size=6))
    end = data.draw(st.sampled_from(["\n", "\r\n", "\r"]))
    wire = "".join(f": hi{end}data: {json.dumps(t, ensure_ascii=False)}{end}{end}" for t in texts)
    parser, found, rest = EventParser(), [], (wire + end).encode()
    while rest:
        cut = data.draw(st.integers(1, len(rest)))
        found += parser.push(rest[:cut])
        rest = rest[cut:]
    found += parser.push(b":")  # a CR at the very end waits for what follows
    assert [json.loads(event) for event in found] == texts


def test_lines_of_one_event_are_joined() -> None:
    parser = EventParser()
    assert parser.push(b"event: x\ndata: a\ndata:b\nid: 3\n\n\n") == ["a\nb"]


def test_pieces_of_both_routes() -> None:
    assert piece_of('{"choices": [{"text": "a", "finish_reason": "stop"}]}') == Piece("a", "stop")
    assert piece_of('{"choices": [{"delta": {"content": "b"}}]}') == Piece("b")
    assert piece_of('{"choices": [{"delta": {"role": "assistant", "content": null}}]}') == Piece()
    assert piece_of('{"choices": [{"delta": {"reasoning_content": "hm"}}]}') == Piece("hm")
    counts = '{"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}'
    assert piece_of(counts) == Piece(prompt_tokens=3, completion_tokens=4)
    for bad in ("{", "[]", "3", '{"error": {"message": "oh"}}'):
        with pytest.raises(ServerError) as caught:
            piece_of(bad)
        assert caught.value.kind == "stream_error"


def test_errors_of_any_shape() -> None:
    assert error_text('{"error": {"message": "too long"}}') == "too long"
    assert error_text('{"error": "plain"}') == "plain"
    assert error_text('{"detail": "Not Found"}') == "Not Found"
    assert error_text("<html>") == "<html>"
    assert error_text("") == "no reason given"
    assert error_text("[1]") == "[1]"


def test_both_routes_stream() -> None:
    with echo_server() as echo:
        for base in (echo.base_url, f"{echo.base_url}/v1", f"{echo.base_url}/v1/"):
            endpoint = Endpoint(base)
            assert first_model(endpoint) == "echo"
            for path, body in (
                (COMPLETIONS, {"prompt": "one two"}),
                (CHAT, {"messages": [{"role": "user", "content": "one two"}]}),
            ):
                pieces = list(stream(endpoint, path, {"model": "echo", **body}))
                assert "".join(piece.text for piece in pieces) == "one two "
                assert pieces[-1].completion_tokens == 2
                assert [p.finish_reason for p in pieces if p.finish_reason] == ["length"]


def test_keys_and_refusals() -> None:
    with echo_server(api_key="secret") as echo:
        with pytest.raises(ServerError, match=r"401.*--api-key"):
            first_model(Endpoint(echo.base_url))
        assert first_model(Endpoint(echo.base_url, "secret")) == "echo"


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("boom", "http_500"),
        ("busy", "http_503"),
        ("torn a b c", "broken_stream"),
        ("sour a b c", "stream_error"),
    ],
)
def test_failures_have_a_kind(prompt: str, kind: str) -> None:
    with echo_server() as echo:
        body = {"model": "echo", "prompt": prompt}
        with pytest.raises(ServerError) as caught:
            list(stream(Endpoint(echo.base_url), COMPLETIONS, body))
        assert caught.value.kind == kind

        async def ask() -> None:
            async with httpx2.AsyncClient() as client:
                async for _ in stream_async(client, Endpoint(echo.base_url), COMPLETIONS, body):
                    pass

        with pytest.raises(ServerError) as caught:
            asyncio.run(ask())
        assert caught.value.kind == kind


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "nonsense", "http://", "ftp://x"])
def test_no_server_there(address: str) -> None:
    for call in (first_model, lambda e: list(stream(e, COMPLETIONS, {}))):
        with pytest.raises(ServerError) as caught:
            call(Endpoint(address))
        assert caught.value.kind == "connect"
