"""Engines that die or hang, processes that are killed or stopped: nobody waits for ever."""

import asyncio
import signal
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from helpers.serving import process
from qoq.server.watchdog import Watchdog, where

PATH = "/v1/completions"
LONG: dict[str, Any] = {"prompt": "hello", "max_tokens": 120, "ignore_eos": True}
SOON = 45.0  # seconds, on a machine with much else to do


def whole(url: str) -> tuple[int, str]:
    got = httpx.post(url + PATH, json={**LONG, "n": 3}, timeout=120)
    return got.status_code, got.text


def streamed(url: str) -> tuple[int, str]:
    with httpx.stream("POST", url + PATH, json={**LONG, "stream": True}, timeout=120) as got:
        return got.status_code, "".join(got.iter_text())


def ask_in_all_ways(url: str, threads: ThreadPoolExecutor) -> list[Future[tuple[int, str]]]:
    """Streams and whole answers, enough that some still wait."""
    return [threads.submit(way, url) for way in (whole, streamed) for _ in range(4)]


@pytest.mark.parametrize("fault", ["raises", "hangs", "spins"])
def test_an_engine_that_fails_answers_and_ends_the_process(folder: Path, fault: str) -> None:
    options = ("--engine-step-timeout", 3, "--max-num-seqs", 4, "--shutdown-timeout", 600)
    with (
        process(folder, *options, fault=(fault, 9)) as (child, url, lines),
        ThreadPoolExecutor(8) as threads,
    ):
        start = time.monotonic()
        for asked in ask_in_all_ways(url, threads):
            try:
                status, text = asked.result(SOON)
            except httpx.TransportError:
                continue  # it had not been let in before the server had gone
            assert status == 503 or '"finish_reason":"length"' in text or "engine_dead" in text
            assert "cable" not in text
        while True:  # the process may take a moment to leave; it is never healthy again
            try:
                assert httpx.get(f"{url}/health", timeout=30).status_code == 503
            except httpx.TransportError:
                break
        assert child.wait(SOON) == 1
        assert time.monotonic() - start < 2 * SOON
    log = "".join(lines)
    if fault in ("hangs", "spins"):
        assert "--engine-step-timeout" in log
        assert f"in {fault}" in log  # where it was
    else:
        assert "the engine has died" in log


def test_a_process_that_is_killed_breaks_connections_and_leaves_no_child(
    folder: Path, tmp_path: Path
) -> None:
    template = tmp_path / "loop.jinja"
    template.write_text(
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    )
    options = ("--chat-template", template, "--chat-template-timeout", 3)
    with (
        process(folder, *options, fault=("slow", 1)) as (child, url, _),
        ThreadPoolExecutor(9) as threads,
    ):
        waiting = ask_in_all_ways(url, threads)
        form = {**LONG, "max_tokens": 1, "guided_regex": "a+"}
        assert httpx.post(url + PATH, json=form, timeout=120).status_code == 200
        talk = {"messages": [{"role": "user", "content": "a"}]}
        waiting.append(
            threads.submit(
                lambda: (0, httpx.post(f"{url}/v1/chat/completions", json=talk, timeout=120).text)
            )
        )
        children = psutil.Process(child.pid).children(recursive=True)
        assert len(children) == 2  # templates and grammars
        time.sleep(0.5)
        child.kill()
        start = time.monotonic()
        for asked in waiting:
            with pytest.raises(httpx.TransportError):
                asked.result(SOON)
        assert time.monotonic() - start < SOON
        assert child.wait(SOON) == -signal.SIGKILL
        _, left = psutil.wait_procs(children, timeout=SOON)
        assert left == []


def test_steps_that_take_long_and_a_process_that_is_stopped_are_no_hang(folder: Path) -> None:
    options = ("--engine-step-timeout", 1.5)
    with (
        process(folder, *options, fault=("slow", 1)) as (child, url, _),
        ThreadPoolExecutor(1) as threads,
    ):
        asked = threads.submit(streamed, url)
        time.sleep(0.5)
        child.send_signal(signal.SIGSTOP)
        time.sleep(4)
        child.send_signal(signal.SIGCONT)
        status, text = asked.result(SOON)
        assert (status, '"finish_reason":"length"' in text) == (200, True)
        assert httpx.get(f"{url}/health", timeout=30).status_code == 200


@pytest.mark.parametrize(("sig", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_second_signal_ends_the_drain(folder: Path, sig: signal.Signals, status: int) -> None:
    with (
        process(folder, "--shutdown-timeout", 600, fault=("slow", 1)) as (child, url, _),
        ThreadPoolExecutor(1) as threads,
    ):
        asked = threads.submit(
            lambda: httpx.post(url + PATH, json={**LONG, "prompt": ["a"] * 128}, timeout=120)
        )
        time.sleep(1)
        child.send_signal(sig)
        time.sleep(1)
        assert child.poll() is None
        assert not asked.done()
        child.send_signal(sig)
        got = asked.result(SOON)
        assert (got.status_code, got.json()["error"]["code"]) == (503, "shutting_down")
        assert child.wait(SOON) == status


@pytest.mark.parametrize("signals", [1, 3])
def test_signals_end_a_server_whose_engine_hangs(folder: Path, signals: int) -> None:
    options = ("--engine-step-timeout", 0, "--shutdown-timeout", 0)
    with (
        process(folder, *options, fault=("hangs", 3)) as (child, url, _),
        ThreadPoolExecutor(1) as threads,
    ):
        asked = threads.submit(streamed, url)
        time.sleep(1)
        for _ in range(signals):
            child.send_signal(signal.SIGTERM)
            time.sleep(0.3)
        try:
            _, text = asked.result(SOON)
        except httpx.TransportError:
            text = "shutting_down"  # the third signal asked for no goodbyes
        assert "shutting_down" in text
        assert child.wait(SOON) == 0


@pytest.mark.asyncio
async def test_watchdog_tells_work_from_sleep() -> None:
    dog = Watchdog(0.4)
    watching = asyncio.create_task(dog.watch())
    await asyncio.sleep(0.8)
    assert not watching.done()  # asleep
    for _ in range(12):
        dog.begin()
        await asyncio.sleep(0.1)
        dog.end()
    assert not watching.done()  # busy
    dog.begin()
    await asyncio.wait_for(watching, 30)
    for limit in (0, None):
        never = Watchdog(limit)
        never.begin()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(never.watch(), 0.3)


def test_where_a_thread_is() -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    assert "wait" in where(thread)
    stop.set()
    thread.join()
    assert where(None) == "no thread"
