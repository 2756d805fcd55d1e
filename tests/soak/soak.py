"""A soak: many requests at a time to a server in a process of its own, and what is left of them."""

import asyncio
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from helpers.serving import process
from soak.asks import Ask, Asks
from soak.wire import call

LEAVING, BAD = 0.3, 0.1
REFERENCES = 24
WARM = 0.1  # of the requests, before memory is looked at for the first time
_QUIET_S = 120.0
_RESTED_S = 3.0  # a server without work for a second tidies its memory


@dataclass
class Soak:
    """What was sent and what came of it."""

    port: int
    server: psutil.Process
    every: int  # requests between two looks at the server's memory
    sent: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    compared: int = 0
    rss_mb: list[float] = field(default_factory=list)

    async def send(self, asks: Iterator[Ask], concurrency: int) -> None:
        """All of them, so many at a time."""
        await asyncio.gather(*(self._worker(asks) for _ in range(concurrency)))

    async def _worker(self, asks: Iterator[Ask]) -> None:
        for ask in asks:
            kind = ask.name.partition(":")[0] if ask.name.startswith("bad") else ask.name
            self.sent[kind] += 1
            if self.sent.total() % self.every == 0:
                self.rss_mb.append(_rss_mb(self.server))
            try:
                answer = await call(self.port, ask.message, leave=ask.leave)
            except TimeoutError:
                self.problems.append(f"{ask.name}: no end")
                continue
            if ask.leave is not None:
                continue
            if answer is None:
                self.statuses["closed"] += 1
                if not ask.name.startswith("bad"):
                    self.problems.append(f"{ask.name}: no answer")
                continue
            self.statuses[str(answer.status)] += 1
            try:
                wrong = ask.check(answer)
            except (ValueError, KeyError, TypeError, IndexError) as error:
                wrong = f"{error!r} in {answer.body[:300]!r}"
            if wrong is not None:
                self.problems.append(f"{ask.name}: {wrong}")


def soak(
    folder: Path,
    requests: int,
    *,
    words: str,
    concurrency: int = 64,
    seed: int = 0,
    options: tuple[object, ...] = (),
) -> dict[str, Any]:
    """Figures of ``requests`` requests to the model in ``folder``; "problems" should be empty."""
    rng = random.Random(seed)
    with process(folder, *options) as (child, url, lines):
        port = int(url.rpartition(":")[2])
        info = httpx.get(f"{url}/v1/models").json()["data"][0]
        vocab = httpx.get(f"{url}/tokenizer_info").json()["vocab_size"]
        asks = Asks(rng, context=info["max_model_len"], vocab=vocab, words=words)
        server = psutil.Process(child.pid)
        run = Soak(port, server, max(1, requests // 20))
        # Before the noise: what some requests are answered when they are alone.
        expected = [
            (path, body, _alone(url, path, body))
            for path, body in (asks.reference() for _ in range(REFERENCES))
        ]
        stream = _drawn(asks, expected, rng, run)
        start = time.monotonic()
        warm = int(requests * WARM)
        asyncio.run(run.send(itertools.islice(stream, warm), concurrency))
        _until_quiet(url)
        before = _held(server)
        asyncio.run(run.send(itertools.islice(stream, requests - warm), concurrency))
        seconds = time.monotonic() - start
        gauges = _until_quiet(url)
        after = _held(server)
        again = sum(_alone(url, path, body) != texts for path, body, texts in expected)
        if again:
            run.problems.append(f"{again} texts are not what they were before")
        assert child.poll() is None
    growth = after["rss_mb"] / before["rss_mb"] - 1
    return {
        "requests": requests,
        "concurrency": concurrency,
        "seed": seed,
        "options": [str(option) for option in options],
        "seconds": round(seconds, 1),
        "sent": dict(sorted(run.sent.items())),
        "hung_up": sum(n for name, n in run.sent.items() if name.startswith("hung up")),
        "malformed": run.sent["bad"],
        "answers_by_status": dict(sorted(run.statuses.items())),
        "server_errors": sum(n for status, n in run.statuses.items() if status.startswith("5")),
        "compared_with_alone": run.compared,
        "gauges_at_end": gauges,
        "held_when_warm": before,
        "held_at_end": after,
        "rss_growth": round(growth, 4),
        "rss_mb_meanwhile": run.rss_mb,
        "log_errors": [line[:500] for line in lines if '"level": "error"' in line][:20],
        "problems": run.problems[:50],
        "num_problems": len(run.problems),
    }


def _drawn(
    asks: Asks,
    expected: list[tuple[str, dict[str, Any], list[str]]],
    rng: random.Random,
    run: Soak,
) -> Iterator[Ask]:
    while True:
        draw = rng.random()
        if draw < LEAVING:
            yield asks.leaving()
        elif draw < LEAVING + BAD:
            yield asks.bad()
        elif draw < LEAVING + BAD + 0.15:
            path, body, texts = rng.choice(expected)
            run.compared += 1
            yield asks.ask(path, {**body, "stream": rng.random() < 0.5}, texts)
        else:
            yield asks.good()


def _alone(url: str, path: str, body: dict[str, Any]) -> list[str]:
    answer = httpx.post(url + path, json=body, timeout=300)
    assert answer.status_code == 200, (answer.text, json.dumps(body)[:500])
    return [c["text"] if "text" in c else c["message"]["content"] for c in answer.json()["choices"]]


def _until_quiet(url: str) -> dict[str, float]:
    """The gauges once nothing runs or waits, or after a while."""
    deadline = time.monotonic() + _QUIET_S
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    while True:
        found = metrics(url)
        gauges = {name: found[name] for name in names}
        if not any(gauges.values()) or time.monotonic() > deadline:
            more = ("num_preemptions_total", "prefix_cache_hits_total", "generation_tokens_total")
            return gauges | {name: found[name] for name in more}
        time.sleep(0.2)


def metrics(url: str) -> dict[str, float]:
    """Every metric of ours, summed over its labels."""
    sums: Counter[str] = Counter()
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=60).text):
        for sample in family.samples:
            sums[sample.name.removeprefix("qoq:")] += sample.value
    return dict(sums)


def _held(server: psutil.Process) -> dict[str, float]:
    """What the process holds at rest: memory, files, threads, children and their memory."""
    time.sleep(_RESTED_S)
    children = server.children(recursive=True)
    return {
        "rss_mb": _rss_mb(server),
        "files": server.num_fds(),
        "threads": server.num_threads(),
        "children": len(children),
        "children_rss_mb": round(sum(map(_rss_mb, children)), 1),
    }


def _rss_mb(process: psutil.Process) -> float:
    return round(process.memory_info().rss / 2**20, 1)
