"""Requests that would explode are refused soon, and the streams of others go on meanwhile."""

import json
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers.packed import write_random_packed
from helpers.serving import process

pytestmark = pytest.mark.timeout(900)
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SOON = 60.0  # seconds for a refusal, with streams and perhaps a test suite beside it
TEMPLATE = """
{%- if messages[0].content == "loop" -%}
{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}
{%- elif messages[0].content == "memory" -%}{{ "a" * 5000000000 }}
{%- endif -%}{{ messages[0].content }}"""


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def form(**how: Any) -> tuple[str, dict[str, Any]]:
    return COMPLETIONS, {"prompt": "a", "max_tokens": 4, **how}


def talk(content: str) -> tuple[str, dict[str, Any]]:
    return CHAT, {"messages": [{"role": "user", "content": content}], "max_tokens": 4}


LOOP = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
ENUM = {"enum": [f"word {i}" for i in range(60_000)]}
HOSTILE: dict[str, tuple[str, dict[str, Any]]] = {
    "a schema without end": form(guided_json={"type": "integer", "multipleOf": 123456789}),
    "a schema of 1 MB": form(guided_json={"enum": ["x" * 100] * 10_000}),
    "many properties": form(
        guided_json={"properties": {f"p{i}": {"type": "string"} for i in range(9000)}}
    ),
    "references in a ring": form(guided_json=LOOP),
    "a huge enum": form(response_format={"type": "json_schema", "json_schema": {"schema": ENUM}}),
    "a deep schema": form(guided_json=nested(400)),
    "a tall stack": form(
        guided_grammar="start: r0\n"
        + "".join(f"r{i}: r{i + 1} r{i + 1}\n" for i in range(3000))
        + 'r3000: "a"'
    ),
    "nested parentheses": form(guided_regex="(" * 60_000 + "a" + ")" * 60_000),
    "a template that loops": talk("loop"),
    "a template that eats memory": talk("memory"),
    "a prompt of 10 MB": form(prompt="word " * 2_000_000),
    "a conversation of 10 MB": talk("word " * 2_000_000),
    "ids without end": form(prompt=[5] * 2_000_000),
    "many prompts": form(prompt=["a"] * 100_000),
}
# These are followed step by step: an answer, or the end of that request alone.
HEAVY: dict[str, tuple[str, dict[str, Any]]] = {
    "repeats of repeats": form(guided_regex="(a{1000}){1000}", max_tokens=40),
    "nested quantifiers": form(guided_regex="((a*)*)*b{1,900}", max_tokens=40),
    "many alternatives": form(guided_regex="|".join(f"a{{{i}}}b" for i in range(900)) + "|c"),
}


class Neighbour(threading.Thread):
    """Reads streams, one after another, and times the gaps between their events."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url, self.gaps, self.done = url, list[float](), threading.Event()
        self.failure: Exception | None = None

    def run(self) -> None:
        body = {"prompt": [7, 8], "max_tokens": 400, "ignore_eos": True, "stream": True}
        try:
            with httpx.Client(timeout=300) as http:
                while not self.done.is_set():
                    with http.stream("POST", self.url + COMPLETIONS, json=body) as answer:
                        self.gaps += _gaps(answer.iter_lines())
        except Exception as error:
            self.failure = error


def _gaps(lines: Iterator[str]) -> list[float]:
    gaps, last = [], None
    for line in lines:
        if line.startswith("data: {"):
            assert "error" not in json.loads(line[6:])
            now = time.monotonic()
            gaps += [] if last is None else [now - last]
            last = now
    return gaps


def test_neighbours_of_hostile_requests(tmp_path: Path) -> None:
    packed = write_random_packed(tmp_path)
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    options = ("--chat-template", tmp_path / "t.jinja", "--chat-template-timeout", 2)
    with process(packed, *options) as (child, url, _):
        neighbours = [Neighbour(url) for _ in range(3)]
        for neighbour in neighbours:
            neighbour.start()
        wrong = {}
        with httpx.Client(base_url=url, timeout=300) as http:
            for name, (path, body) in (HOSTILE | HEAVY).items():
                start = time.monotonic()
                answer = http.post(path, json=body)
                allowed = (400, 413) if name in HOSTILE else (200, 400)
                if answer.status_code not in allowed or time.monotonic() - start > SOON:
                    told = (answer.status_code, answer.text[:200], time.monotonic() - start)
                    wrong[name] = told
        for neighbour in neighbours:
            neighbour.done.set()
        for neighbour in neighbours:
            neighbour.join(300)
            assert neighbour.failure is None
        gaps = sorted(gap for neighbour in neighbours for gap in neighbour.gaps)
        assert wrong == {}
        assert child.poll() is None
    print(len(gaps), statistics.quantiles(gaps, n=100)[98], gaps[-8:])
    assert len(gaps) > 500
    assert statistics.quantiles(gaps, n=100)[98] < 0.5
    assert gaps[-1] < 5
