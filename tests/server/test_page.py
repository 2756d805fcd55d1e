"""The page for people, in a real browser: before a stand-in that can fail, and before a server."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import serving
from helpers.browser import chromium
from helpers.openai_server import METRICS, Echo, echo_server
from helpers.serving import LiveServer
from qoq.server.model import ServedModel
from qoq.server.page import page_files
from qoq.server.report import start_report

STATIC = Path(__file__).parents[2] / "src" / "qoq" / "server" / "static"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


class Visit:
    """A page and what went wrong in it."""

    def __init__(self, browser: Any, server: Echo | LiveServer, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.problems: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on(
            "console",
            lambda line: (
                self.problems.append(line.text)
                if line.type == "error" and "Failed to load resource" not in line.text
                else None
            ),
        )
        base_url = server.base_url if isinstance(server, Echo) else server.url
        self.page.goto(f"{base_url}/")

    def ask(self, text: str) -> None:
        self.page.fill("#input", text)
        self.page.press("#input", "Enter")

    def wait(self, selector: str) -> Any:
        return self.page.wait_for_selector(selector, state="attached")

    def close(self) -> None:
        self.context.close()
        assert self.problems == []


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    made: list[Visit] = []

    def go(server: Echo | LiveServer, **options: Any) -> Visit:
        made.append(Visit(browser, server, **options))
        return made[-1]

    yield go
    for each in made:
        each.close()


def test_files_and_their_headers() -> None:
    pages = page_files()
    assert {"/", "/static/app.js", "/static/style.css", "/static/icon.svg"} <= pages.keys()
    assert len(pages) == len(list(STATIC.iterdir()))
    for body, headers in pages.values():
        assert body
        assert "script-src 'self'" in headers["Content-Security-Policy"]
    html = pages["/"][0].decode()
    assert not re.search(r"<style|\son\w+=|\sstyle=|<script(?![^>]*src=)", html)
    for body, _ in pages.values():  # nothing from elsewhere, no markup made of text
        assert not re.findall(rb"https?://(?!www\.w3\.org/2000/svg)", body)
        assert not re.search(rb"innerHTML|outerHTML|insertAdjacentHTML|document\.write", body)


def test_a_chat_streams_and_shows_its_speed(visit: Any) -> None:
    with echo_server(pages=page_files(), delay=0.01) as echo:
        seen = visit(echo)
        seen.wait("#model option[value=echo]")
        seen.page.fill("[name=system]", "be well")
        seen.page.fill("[name=temperature]", "0.5")
        seen.ask("one two <b>three</b> <img src=x onerror=alert(1)> four")
        seen.wait(".answer:not(.busy)")
        assert "<b>three</b> <img" in seen.page.inner_text(".answer .text")
        assert seen.page.query_selector(".answer img, .answer b, .user img") is None
        foot = seen.page.inner_text(".answer .foot")
        assert "7 tokens" in foot
        assert "tokens/s" in foot
        assert "first after" in foot
        body = echo.bodies[-1]
        assert body["temperature"] == 0.5
        assert [m["role"] for m in body["messages"]] == ["system", "user"]
        seen.ask("again")
        seen.wait(".answer >> nth=1")
        seen.wait(".answer:not(.busy) >> nth=1")
        assert [m["role"] for m in echo.bodies[-1]["messages"]][-2:] == ["assistant", "user"]
        seen.page.reload()
        assert seen.page.input_value("[name=system]") == "be well"  # kept in the browser


def test_on_a_server(visit: Any, model: ServedModel) -> None:
    with serving.live(model) as server:
        seen = visit(server)
        seen.wait(f"#model option[value={serving.NAME}]")
        seen.page.fill("[name=max_tokens]", "12")
        for index in range(2):
            seen.ask("hello")
            seen.wait(f".answer:not(.busy) >> nth={index}")
            assert "tokens/s" in seen.page.inner_text(f".answer .foot >> nth={index}")
        assert seen.page.query_selector(".failed") is None
        seen.page.click("#tab-dashboard")
        seen.page.wait_for_selector("#totals:has-text('2 length')")
        assert "running" not in seen.page.inner_text("#status")
        assert re.search(r"New tokens\s+24\b", seen.page.inner_text("#totals"))
        runs = seen.page.inner_text("#runs")
        assert serving.NAME in runs
        ops = start_report(model)["ops"]
        assert all(op in runs for op in ops)
        assert {what.split()[0] for what in ops.values()} == set(re.findall(r"Run by (\S+)", runs))


def test_stop_hangs_up_and_keeps_the_text(visit: Any) -> None:
    with echo_server(pages=page_files(), delay=0.05) as echo:
        seen = visit(echo)
        seen.ask("word " * 200)
        seen.page.wait_for_selector(".answer .foot:has-text('tokens')")
        seen.page.click("#stop")
        seen.wait(".answer:not(.busy)")
        assert "stopped" in seen.page.inner_text(".answer .foot")
        assert 1 <= seen.page.inner_text(".answer .text").count("word") < 200
        for _ in range(50):
            if echo.hung_up:
                break
            seen.page.wait_for_timeout(50)
        assert echo.hung_up == 1
        assert seen.page.is_visible("#send")


def test_models_without_a_template_continue_text(visit: Any) -> None:
    with echo_server(pages=page_files(), template=False) as echo:
        seen = visit(echo)
        seen.ask("It was a dark")
        seen.wait(".answer:not(.busy)")
        assert "no chat template" in seen.page.inner_text(".aside")
        assert echo.bodies[-1]["prompt"] == "It was a dark"
        assert seen.page.input_value("[name=mode]") == "text"
        seen.ask("night")
        seen.wait(".answer:not(.busy) >> nth=1")
        assert echo.bodies[-1]["prompt"] == "It was a darkIt was a dark \nnight"


@pytest.mark.parametrize(
    ("said", "told"),
    [("boom", "something broke"), ("torn a b c d", "middle of the answer"), ("sour a b c", "sour")],
)
def test_failures_are_told_and_can_be_tried_again(visit: Any, said: str, told: str) -> None:
    with echo_server(pages=page_files()) as echo:
        seen = visit(echo)
        seen.ask(said)
        seen.wait(".failed")
        assert told in seen.page.inner_text(".failed")
        before = len(echo.bodies)
        seen.page.click(".failed button")
        seen.wait(".failed")
        for _ in range(50):
            if len(echo.bodies) > before:
                break
            seen.page.wait_for_timeout(20)
        assert len(echo.bodies) == before + 1
        assert [m["role"] for m in echo.bodies[-1]["messages"]] == ["user"]


def test_a_key_is_asked_for_and_sent(visit: Any) -> None:
    with echo_server(pages=page_files(), api_key="secret") as echo:
        seen = visit(echo)
        seen.page.wait_for_selector("#empty-note:has-text('API key')")
        seen.page.fill("[name=api_key]", "secret")
        seen.page.press("[name=api_key]", "Tab")
        seen.wait("#model option[value=echo]")
        seen.ask("hello")
        seen.wait(".answer:not(.busy)")


def test_the_dashboard_shows_what_the_metrics_say(visit: Any) -> None:
    with echo_server(pages=page_files()) as echo:
        echo.metrics = METRICS % (3, 100, 1000)
        seen = visit(echo)
        seen.page.click("#tab-dashboard")
        seen.page.wait_for_selector(".card:has-text('Requests') .figure:has-text('3')")
        assert "3 running" in seen.page.inner_text("#status")
        assert "25.0 %" in seen.page.inner_text(".card:has-text('KV cache in use')")
        assert "40.0 %" in seen.page.inner_text(".card:has-text('Prefix cache')")
        assert "w4a8kv4-g128" in seen.page.inner_text("#runs")
        assert "4,096 tokens" in seen.page.inner_text("#totals")
        assert "25.0 % of 2,000" in seen.page.inner_text("#totals")
        echo.metrics = METRICS % (3, 10_000, 1000)
        seen.page.wait_for_selector(".card:has-text('Throughput') .value:text-matches('[0-9]')")
        painted = seen.page.evaluate(
            "[...document.querySelectorAll('canvas')].map((c) => c.getContext('2d')"
            ".getImageData(0, 0, c.width, c.height).data.some(Boolean))"
        )
        assert painted == [True] * 6
        echo.metrics = echo.metrics.replace(" 2000.0", " 0.0").replace(" 500.0", " 0.0")
        seen.page.wait_for_selector("#totals:not(:has-text('Guessed'))")
        echo.metrics = None
        seen.page.wait_for_selector("#notice:has-text('no metrics')")
        seen.context.set_offline(True)
        seen.page.wait_for_selector("#notice:has-text('cannot be reached')")
        assert seen.page.get_attribute("#status", "data-state") == "bad"


@pytest.mark.parametrize("width", [320, 390, 820, 1280])
def test_nothing_sticks_out(visit: Any, width: int) -> None:
    with echo_server(pages=page_files()) as echo:
        seen = visit(echo, viewport={"width": width, "height": 700})
        seen.ask("wide" * 200)
        seen.wait(".answer:not(.busy)")
        for view in ("chat", "dashboard"):
            seen.page.click(f"#tab-{view}")
            assert seen.page.evaluate("document.documentElement.scrollWidth") <= width


def test_prometheus_text_is_read(visit: Any) -> None:
    text = "\n".join(
        [
            "# HELP a:x_total x",
            'a:x_total{m="q\\"}\\n,",k="1"} 2 1700000000',
            'a:x_total{m="b"} 3.5e0',
            "plain 1",
            "nonsense line {",
            'h_bucket{le="1"} 10',
            'h_bucket{le="2"} 20',
            'h_bucket{le="+Inf"} 20',
            "bad NaN",
        ]
    )
    with echo_server(pages=page_files()) as echo:
        seen = visit(echo)
        got = seen.page.evaluate(
            """async (text) => {
              const p = await import("./static/prometheus.js");
              const now = p.parse(text);
              const before = p.parse(
                'a:x_total 1.5\\nh_bucket{le="1"} 10\\nh_bucket{le="2"} 10\\n' +
                'h_bucket{le="+Inf"} 10');
              return {
                total: p.total(now, "x"), plain: p.total(now, "plain"), none: p.total(now, "y"),
                label: [...p.byLabel(now, "x", "m")], rate: p.rate(now, before, "x", 2),
                back: p.rate(before, now, "x", 2),
                median: p.quantile(now, null, "h", 0.5), late: p.quantile(now, before, "h", 0.5),
                empty: p.quantile(now, now, "h", 0.5),
              };
            }""",
            text,
        )
    assert got["total"] == 5.5
    assert (got["plain"], got["none"]) == (1, None)
    assert got["label"] == [['q"}\n,', 2], ["b", 3.5]]
    assert (got["rate"], got["back"]) == (2, None)
    assert math.isclose(got["median"], 1)
    assert math.isclose(got["late"], 1.5)
    assert got["empty"] is None
