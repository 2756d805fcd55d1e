"""The engine's thread: queue, aborts, death, drain, idleness, metrics."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from helpers import serving
from helpers.serving import Client, client
from qoq.engine.engine import Engine
from qoq.server.model import ServedModel

pytestmark = pytest.mark.asyncio
PATH = "/v1/completions"
LONG: dict[str, Any] = {"prompt": "hello", "max_tokens": 120, "ignore_eos": True}


def slow_steps(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.02) -> list[int]:
    """Steps take a while; the list counts them."""
    step, count = Engine.step, [0]

    def slow(self: Engine) -> Any:
        count[0] += 1
        time.sleep(seconds)
        return step(self)

    monkeypatch.setattr(Engine, "step", slow)
    return count


async def test_full_queue_is_a_503_and_counted(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_steps(monkeypatch)
    async with client(model, max_queued=0) as app:
        room = model.max_num_seqs
        first = asyncio.create_task(app.post(PATH, {**LONG, "n": room, "max_tokens": 60}))
        while app.context.engine.num_open < room:
            await asyncio.sleep(0.01)
        got = await app.post(PATH, LONG)
        assert got.status_code == 503
        assert int(got.headers["retry-after"]) > 0
        assert got.json()["error"]["code"] == "queue_full"
        assert await app.metric("admission_rejections_total", reason="queue_full") == 1
        too_many = await app.post(PATH, {**LONG, "n": room + 1})
        assert too_many.status_code == 400
        assert (await first).status_code == 200
        assert (await app.post(PATH, {**LONG, "max_tokens": 1})).status_code == 200
        await app.until_idle()


async def test_time_limit_of_a_request(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_steps(monkeypatch, 0.05)
    async with client(model, request_timeout=0.3) as app:
        got = await app.post(PATH, LONG)
        assert got.status_code == 408
        await app.until_idle()
        events = await app.events(PATH, LONG)
        assert events[-1]["error"]["code"] == "timeout"
        await app.until_idle()
        assert await app.metric("request_success_total", finished_reason="abort") == 2


async def test_death_answers_everyone_and_is_seen(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = serving.load(folder)  # not the other tests' engine
    step, count = Engine.step, [0]

    def dying(self: Engine) -> Any:
        count[0] += 1
        if count[0] == 4:
            raise RuntimeError("a cable was pulled")
        time.sleep(0.05)
        return step(self)

    monkeypatch.setattr(Engine, "step", dying)
    async with client(model) as app:
        noticed = asyncio.Event()
        app.context.engine.on_death = noticed.set
        whole, streamed = await asyncio.gather(
            app.post(PATH, LONG), app.events(PATH, {**LONG, "prompt": "t"})
        )
        assert whole.status_code == 503
        assert whole.json()["error"]["code"] == "engine_dead"
        assert streamed[-1]["error"]["code"] == "engine_dead"
        assert noticed.is_set()
        for path in ("/health", "/ping"):
            assert (await app.get(path)).status_code == 503
        late = await app.post(PATH, LONG)
        assert late.status_code == 503
        assert "retry-after" not in late.headers
        assert (await app.get("/metrics")).status_code == 200
        assert "cable" not in whole.text + late.text


async def test_drain_lets_open_requests_end(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_steps(monkeypatch, 0.01)
    async with client(model) as app:
        answer = asyncio.create_task(app.post(PATH, {**LONG, "max_tokens": 40}))
        while not app.context.engine.num_open:
            await asyncio.sleep(0.01)
        draining = asyncio.create_task(app.context.engine.drain(30))
        await asyncio.sleep(0)
        late = await app.post(PATH, LONG)
        assert late.status_code == 503
        assert late.json()["error"]["code"] == "shutting_down"
        assert "retry-after" in late.headers
        assert (await answer).status_code == 200
        assert await draining is True


async def test_drain_ends_what_takes_too_long(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_steps(monkeypatch, 0.05)
    async with client(model) as app:
        answers = asyncio.gather(app.post(PATH, LONG), app.events(PATH, LONG))
        while app.context.engine.num_open < 2:
            await asyncio.sleep(0.01)
        assert await app.context.engine.drain(0.2) is False
        whole, streamed = await answers
        assert whole.status_code == 503
        assert streamed[-1]["error"]["code"] == "shutting_down"
        await app.until_idle()


async def test_idle_engine_sleeps(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    count = slow_steps(monkeypatch, 0)
    async with client(model) as app:
        assert (await app.post(PATH, {**LONG, "max_tokens": 3})).status_code == 200
        await app.until_idle()
        before, cpu = count[0], time.process_time()
        await asyncio.sleep(0.5)
        assert count[0] == before
        assert time.process_time() - cpu < 0.25


async def test_one_refused_text_aborts_its_neighbours(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the engine alone can refuse comes back as a 400 even for a stream."""
    from qoq.errors import RequestError

    add = Engine.add

    def picky(self: Engine, prompt_ids: Any, params: Any, **more: Any) -> Any:
        if len(prompt_ids) == 1:
            raise RequestError("Too short for my taste.")
        return add(self, prompt_ids, params, **more)

    monkeypatch.setattr(Engine, "add", picky)
    async with client(model) as app:
        got = await app.post(PATH, {**LONG, "prompt": ["hello t", "t"], "stream": True})
        assert got.status_code == 400
        assert "taste" in got.json()["error"]["message"]
        await app.until_idle()


async def test_metrics_of_some_requests(model: ServedModel) -> None:
    async with client(model) as app:
        for tokens in (1, 5, 7):
            body = {**LONG, "prompt": [5, 6, 7], "max_tokens": tokens}
            assert (await app.post(PATH, body)).status_code == 200
        await app.until_idle()
        wanted = {
            "prompt_tokens_total": 9,
            "generation_tokens_total": 13,
            "num_requests_running": 0,
            "num_requests_waiting": 0,
            "kv_cache_usage_perc": 0,
            "num_preemptions_total": 0,
            "time_to_first_token_seconds_count": 3,
            "e2e_request_latency_seconds_count": 3,
            "request_queue_time_seconds_count": 3,
            "request_prefill_time_seconds_count": 3,
            "request_decode_time_seconds_count": 3,
            "request_inference_time_seconds_count": 3,
            "inter_token_latency_seconds_count": 10,
            "request_time_per_output_token_seconds_count": 2,
            "iteration_tokens_total_sum": 9 + 10,
            "cache_config_info": 1,
        }
        for name, value in wanted.items():
            assert await app.metric(name, model_name="tiny") == value, name
        assert await app.metric("request_success_total", finished_reason="length") == 3


async def _mixed(app: Client, count: int) -> list[str]:
    bodies = [
        {**LONG, "prompt": "hello " * (1 + i % 5), "max_tokens": 5 + i % 20, "seed": i}
        for i in range(count)
    ]
    got = await asyncio.gather(*(app.post(PATH, body) for body in bodies))
    assert [answer.status_code for answer in got] == [200] * count
    return [answer.json()["choices"][0]["text"] for answer in got]


async def test_many_at_a_time_with_aborts_between(model: ServedModel) -> None:
    async with client(model) as app:
        calm = await _mixed(app, 30)
        hasty = [asyncio.create_task(app.post(PATH, LONG)) for _ in range(30)]
        busy = asyncio.create_task(_mixed(app, 30))
        await asyncio.sleep(0.05)
        for task in hasty[::2]:
            task.cancel()  # as when the client hangs up
        assert [len(text) > 0 for text in await busy] == [len(text) > 0 for text in calm]
        await asyncio.gather(*hasty, return_exceptions=True)
        await app.until_idle()
