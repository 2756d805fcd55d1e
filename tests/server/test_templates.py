"""Chat templates that loop, explode, lie or die are cut off, and the next conversation works."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from qoq.errors import RequestError
from qoq.server.templates import TemplateProcess
from qoq.tokenizer import ChatTemplate

TALK = [{"role": "user", "content": "hello"}]
PLAIN = "{{ bos }}{% for m in messages %}{{ m.content }}{% endfor %}{{ extra }}"


class OneTemplate:
    """A template and the process that renders it."""

    def __init__(self, source: str) -> None:
        self.template = ChatTemplate(source, {"bos": "<s>"})
        self.process = TemplateProcess(time_limit=1.0)
        self.start = self.process.start

    def render(self, messages: Any, **options: Any) -> str:
        return self.process.render(self.template, messages, **options)


@contextmanager
def process(source: str) -> Iterator[OneTemplate]:
    one = OneTemplate(source)
    try:
        yield one
    finally:
        one.process.close()


def test_renders_as_in_this_process() -> None:
    with process(PLAIN) as template:
        options: Any = {"variables": {"extra": "!ü\n"}}
        here = template.template.render(TALK, **options)
        assert template.render(TALK, **options) == here == "<s>hello!ü\n"
        with pytest.raises(RequestError, match="empty"):
            template.render([])


def test_a_conversation_that_is_too_deep() -> None:
    value: Any = "a"
    for _ in range(5000):
        value = [value]
    with process(PLAIN) as template:
        with pytest.raises(RequestError, match="nested too deeply"):
            template.render([{"role": "user", "content": "a", "x": value}])
        assert template.render(TALK) == "<s>hello"


def test_a_template_that_works_only_sometimes() -> None:
    """A loop, arithmetic in one long instruction, and memory: by what the message says."""
    source = (
        "{% set c = messages[0].content %}"
        "{% if c == 'loop' %}{% for i in range(99999) %}{% for j in range(99999) %}"
        "{% endfor %}{% endfor %}"
        "{% elif c == 'power' %}{{ c | length ** (9 ** 9) }}"
        "{% elif c == 'memory' %}{{ c * 5000000000 }}"
        "{% elif c == 'raise' %}{{ raise_exception('no thanks') }}"
        "{% else %}fine{% endif %}"
    )
    with process(source) as template:
        for content in ("loop", "power", "memory"):
            start = time.monotonic()
            with pytest.raises(RequestError, match=r"cut off|refuses"):
                template.render([{"role": "user", "content": content}])
            assert time.monotonic() - start < 30
            assert template.render(TALK) == "fine"
        with pytest.raises(RequestError, match="no thanks"):
            template.render([{"role": "user", "content": "raise"}])


@pytest.mark.parametrize("constant", ["9 ** (9 ** 9)", "'a' * 5000000000"])
def test_constants_that_explode_when_compiled(constant: str) -> None:
    with process("{{ " + constant + " }}") as template:
        template.start()
        start = time.monotonic()
        with pytest.raises(RequestError, match=r"cut off|refuses"):
            template.render(TALK)
        assert time.monotonic() - start < 30


def test_what_the_sandbox_forbids() -> None:
    for source in (
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% include 'x' %}",
        "{{ unclosed",
    ):
        with process(source) as template, pytest.raises(RequestError, match="refuses"):
            template.render(TALK)
