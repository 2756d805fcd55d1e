"""The load test's client against a server whose answers are known."""

import asyncio
import itertools
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.openai_server import echo_server
from helpers.tiny import write_byte_tokenizer
from helpers.verbs import answer, refusal, run
from qoq.bench.load import Load, Ramp, Sample, arrivals, check, run_load
from qoq.bench.prompts import Ask, Writer, file_asks, prefix_asks, random_asks
from qoq.bench.serving import parse_goals, percentile, summarize
from qoq.client.api import CHAT, COMPLETIONS, Endpoint
from qoq.errors import RequestError, ServerError
from qoq.tokenizer import Tokenizer


def test_arrivals_are_poisson_and_repeat() -> None:
    times = arrivals(4000, 10.0, 1.0, seed=3)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert times[0] == 0
    assert statistics.fmean(gaps) == pytest.approx(0.1, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(0.1, rel=0.1)
    assert times == arrivals(4000, 10.0, 1.0, seed=3)
    assert times != arrivals(4000, 10.0, 1.0, seed=4)
    assert arrivals(3, math.inf, 1.0, 0) == [0.0] * 3
    steady = arrivals(2000, 10.0, 50.0, seed=3)
    assert statistics.stdev(b - a for a, b in itertools.pairwise(steady)) < 0.03
    for rate, burstiness in ((0, 1), (-1, 1), (math.nan, 1), (1, 0)):
        with pytest.raises(RequestError, match="above 0"):
            arrivals(1, rate, burstiness, 0)


@given(
    st.floats(0.1, 50), st.floats(0.1, 50), st.booleans(), st.integers(0, 9), st.integers(50, 300)
)
@settings(deadline=None)
def test_rates_that_grow(
    start: float, end: float, exponential: bool, seed: int, count: int
) -> None:
    ramp = Ramp(start, end, exponential)
    assert ramp.rate(0) == pytest.approx(start)
    assert ramp.rate(1) == pytest.approx(end)
    middle = math.sqrt(start * end) if exponential else (start + end) / 2
    assert ramp.rate(0.5) == pytest.approx(middle)
    times = arrivals(count, ramp, 1e6, seed)  # steady, so that gaps are the rate's
    gaps = [b - a for a, b in itertools.pairwise(times)]
    wanted = [1 / ramp.rate(i / count) for i in range(count - 1)]
    assert gaps == pytest.approx(wanted, rel=0.02)
    assert arrivals(count, Ramp(start, start), 1.0, seed) == arrivals(count, start, 1.0, seed)


def test_rates_that_grow_from_nothing_are_refused() -> None:
    for ramp in (Ramp(0, 1), Ramp(1, 0), Ramp(-1, 1), Ramp(1, math.nan)):
        with pytest.raises(RequestError, match="above 0"):
            arrivals(1, ramp, 1.0, 0)


def test_random_texts(tmp_path: Path) -> None:
    sizes = {"input_len": 20, "output_len": 8, "range_ratio": 0.5, "prefix_len": 4}
    asks = random_asks(Writer(1), 50, **sizes)
    assert asks == random_asks(Writer(1), 50, **sizes)
    assert asks != random_asks(Writer(2), 50, **sizes)
    lengths = [len(ask.prompt.split()) - 4 for ask in asks]
    assert min(lengths) >= 10
    assert max(lengths) <= 30
    assert len(set(lengths)) > 5
    assert {ask.max_tokens for ask in asks} <= set(range(4, 13))
    assert len({tuple(ask.prompt.split()[:4]) for ask in asks}) == 1
    write_byte_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    [exact] = random_asks(Writer(1, tokenizer), 1, input_len=37, output_len=1)
    assert len(tokenizer.encode(exact.prompt, special=False)) == 37
    for bad in ({**sizes, "input_len": 0}, {**sizes, "range_ratio": 1.0}):
        with pytest.raises(RequestError):
            random_asks(Writer(1), 1, **bad)


def test_shared_prefixes() -> None:
    asks = prefix_asks(Writer(1), 12, prefix_len=5, suffix_len=3, num_prefixes=4, output_len=2)
    heads = [" ".join(ask.prompt.split()[:5]) for ask in asks]
    assert sorted(heads.count(head) for head in set(heads)) == [3, 3, 3, 3]
    assert len({ask.prompt for ask in asks}) == 12
    assert heads != sorted(heads)


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    said = [{"role": "user", "content": "hi"}]
    lines = [{"prompt": "a", "output_tokens": 3}, {"messages": said, "max_tokens": 5}]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    assert file_asks(file, None, None) == [Ask("a", 3), Ask("hi", 5, said)]
    assert [ask.prompt for ask in file_asks(file, 3, 7)] == ["a", "hi", "a"]
    for bad in ("{", "3", "{}", '{"prompt": "a", "max_tokens": "x"}', ""):
        file.write_text(bad, encoding="utf-8")
        with pytest.raises(RequestError, match=r"a\.jsonl"):
            file_asks(file, None, None)
    with pytest.raises(RequestError, match="cannot be read"):
        file_asks(tmp_path / "none", None, None)


_SECONDS = st.integers(0, 10**10).map(lambda us: us / 1e6)


@given(st.lists(_SECONDS, min_size=1, max_size=60), st.floats(0, 100))
@settings(deadline=None)
def test_percentiles_are_numpy_s(values: list[float], p: float) -> None:
    assert percentile(values, p) == pytest.approx(np.percentile(values, p), rel=1e-12, abs=1e-300)
    assert percentile(values, 0) == min(values)
    assert percentile(values, 100) == max(values)


@st.composite
def _samples(draw: st.DrawFn) -> Sample:
    ttft = draw(_SECONDS)
    gaps = tuple(draw(st.lists(_SECONDS, max_size=5)))
    failed = draw(st.booleans())
    return Sample(
        start=draw(_SECONDS),
        late=0.0,
        e2el=ttft + sum(gaps),
        ttft=ttft,
        gaps=gaps,
        input_tokens=draw(st.integers(0, 50)),
        output_tokens=draw(st.integers(0, 50)),
        failure="http_500" if failed else None,
    )


@given(st.lists(_samples(), max_size=20), st.lists(st.sampled_from([1, 25, 50, 90, 99, 100])))
@settings(deadline=None)
def test_figures_are_numpy_s(samples: list[Sample], percents: list[int]) -> None:
    goals = {"ttft": 5000.0, "e2el": 20000.0}
    if samples:  # reached exactly by one of them
        goals = {"ttft": 1e3 * samples[0].ttft, "e2el": 1e3 * samples[0].e2el}
    facts = summarize(samples, goals, percents)
    good = [sample for sample in samples if sample.failure is None]
    end = max((sample.start + sample.e2el for sample in samples), default=0.0)
    rate = 1 / end if end else 0.0
    kept = [s for s in good if 1e3 * s.ttft <= goals["ttft"] and 1e3 * s.e2el <= goals["e2el"]]
    assert facts["request_goodput"] == pytest.approx(len(kept) * rate)
    assert facts["output_throughput"] == pytest.approx(sum(s.output_tokens for s in good) * rate)
    measured = {
        "ttft": [s.ttft for s in good],
        "e2el": [s.e2el for s in good],
        "itl": [gap for s in good for gap in s.gaps],
        "tpot": [(s.e2el - s.ttft) / (s.output_tokens - 1) for s in good if s.output_tokens > 1],
    }
    for metric, seconds in measured.items():
        names = ["mean", "median", "std", *(f"p{p}" for p in percents)]
        if not seconds:
            assert all(facts[f"{name}_{metric}_ms"] is None for name in names)
            continue
        ms = 1e3 * np.array(seconds)
        wanted = [ms.mean(), np.median(ms), ms.std(), *(np.percentile(ms, p) for p in percents)]
        told = [facts[f"{name}_{metric}_ms"] for name in names]
        assert told == pytest.approx(wanted, rel=1e-9, abs=1e-6)


def test_figures_of_known_samples() -> None:
    samples = [
        Sample(0.0, 0.0, 1.1, 0.1, (0.5, 0.5), 10, 3),
        Sample(1.0, 0.0, 1.0, 0.5, (0.25,), 20, 2),
        Sample(0.5, 0.0, 0.2, failure="http_503", message="full"),
        Sample(0.6, 0.2, 0.3, 0.3, (), 5, 1),
    ]
    facts = summarize(samples, {"ttft": 400, "tpot": 600}, (50, 99))
    assert facts["duration"] == 2.0
    assert (facts["completed"], facts["failed"], facts["failures"]) == (3, 1, {"http_503": 1})
    assert facts["errors"] == ["full"]
    assert facts["request_throughput"] == 1.5
    assert facts["output_throughput"] == 3.0
    assert facts["total_token_throughput"] == (35 + 6) / 2
    assert facts["request_goodput"] == 2 / 2  # the second took 500 ms to its first token
    assert facts["mean_ttft_ms"] == pytest.approx(300)
    assert facts["median_tpot_ms"] == pytest.approx(500)
    assert facts["median_itl_ms"] == pytest.approx(500)
    assert facts["max_concurrent_requests"] == 3
    assert facts["max_late_ms"] == 200
    empty = summarize([], None)
    assert empty["request_throughput"] == 0
    assert empty["mean_ttft_ms"] is None


def test_goals() -> None:
    assert parse_goals(["ttft:200", "tpot:50,e2el:1e3"]) == {"ttft": 200, "tpot": 50, "e2el": 1000}
    for bad in ("itl:3", "ttft", "ttft:x", "ttft:0", "ttft:nan", "a:b"):
        with pytest.raises(RequestError, match="ttft:200"):
            parse_goals([bad])


def test_times_are_the_servers() -> None:
    with echo_server(delay=0.03) as echo:
        load = Load(Endpoint(echo.base_url), "echo", COMPLETIONS, {"ignore_eos": True})
        [sample] = asyncio.run(run_load(load, [Ask("a b c", 6)]))
    assert sample.failure is None
    assert (sample.input_tokens, sample.output_tokens, len(sample.gaps)) == (3, 6, 5)
    assert sample.ttft >= 0.03
    assert sample.e2el >= 6 * 0.03
    assert sample.tpot is not None
    assert sample.tpot >= 0.03
    assert sample.tpot == pytest.approx(sum(sample.gaps) / 5, rel=0.3)
    assert echo.bodies[0]["stream_options"] == {"include_usage": True}


def test_concurrency_is_held_and_reached() -> None:
    with echo_server(delay=0.01) as echo:
        load = Load(Endpoint(echo.base_url), "echo", COMPLETIONS, max_concurrency=3)
        samples = asyncio.run(run_load(load, [Ask("a b c d", 4)] * 12))
    assert all(sample.failure is None for sample in samples)
    assert echo.most_running == 3


def test_an_open_loop_does_not_wait() -> None:
    with echo_server(delay=0.05) as echo:
        load = Load(Endpoint(echo.base_url), "echo", COMPLETIONS, request_rate=100.0)
        samples = asyncio.run(run_load(load, [Ask("a b c d", 4)] * 10))
    assert echo.most_running > 3
    due = arrivals(10, 100.0, 1.0, 0)
    assert all(s.start >= at for s, at in zip(samples, due, strict=True))


def test_failures_are_counted_and_the_rest_goes_on() -> None:
    words = ["a b", "boom", "torn a b c", "sour a b c", "busy", "x y z"]
    with echo_server(usage=False) as echo:
        load = Load(Endpoint(echo.base_url), "echo", CHAT)
        samples = asyncio.run(run_load(load, [Ask(word, 8) for word in words]))
        with pytest.raises(ServerError, match="500"):
            asyncio.run(check(load, Ask("boom", 1)))
    kinds = [sample.failure for sample in samples]
    assert kinds == [None, "http_500", "broken_stream", "stream_error", "http_503", None]
    assert [s.output_tokens for s in samples if s.failure is None] == [2, 3]  # counted here


def test_an_answer_without_text_still_has_times() -> None:
    with echo_server(token="", delay=0.02) as echo:
        load = Load(Endpoint(echo.base_url), "echo", COMPLETIONS)
        [sample] = asyncio.run(run_load(load, [Ask("a b", 2)]))
    assert sample.failure is None
    assert sample.output_tokens == 2
    assert sample.ttft == sample.e2el >= 0.04


def test_the_verb(tmp_path: Path) -> None:
    result, picture = tmp_path / "r.json", tmp_path / "p.svg"
    with echo_server() as echo:
        base = ["bench", "serve", "--base-url", echo.base_url, "--num-prompts", 8]
        base += ["--random-input-len", 5, "--random_output_len", 4]
        got = answer(
            *base,
            "--request-rate",
            500,
            "--result-filename",
            result,
            "--picture",
            picture,
            "--goodput",
            "ttft:9999",
            "tpot:9999",
        )
        assert got == json.loads(result.read_text(encoding="utf-8"))
        assert (got["completed"], got["failed"]) == (8, 0)
        assert got["total_output_tokens"] == 32
        assert got["total_input_tokens"] == 40
        assert got["request_goodput"] == pytest.approx(got["request_throughput"])
        assert got["mean_ttft_ms"] > 0
        assert got["goodput"] == {"ttft": 9999, "tpot": 9999}
        assert "hardware" in got
        assert "<svg" in picture.read_text(encoding="utf-8")
        assert len(echo.bodies) == 9  # one to warm up
        first = [body["prompt"] for body in echo.bodies[1:]]
        echo.bodies.clear()
        shown = run(*base, "--max-concurrency", 2, "--num-warmups", 0).stdout
        assert sorted(body["prompt"] for body in echo.bodies) == sorted(first)
        assert "8 completed" in shown
        assert "TTFT" in shown
        echo.bodies.clear()
        run(*base, "--dataset-name", "prefix_repetition", "--backend", "openai-chat")
        assert "messages" in echo.bodies[0]
        ramp = ("--ramp-up-start-rps", 300, "--ramp-up-end-rps", 600)
        got = answer(*base, "--ramp-up-strategy", "linear", *ramp)
        assert (got["ramp_up_strategy"], got["ramp_up_end_rps"]) == ("linear", 600)
        assert got["completed"] == 8
        assert answer(*base, "--request-rate", "inf")["request_rate"] == "inf"


def test_the_verb_refuses(tmp_path: Path) -> None:
    assert "is it running" in refusal("bench", "serve", "--base-url", "http://127.0.0.1:1")
    with echo_server() as echo:
        base = ["bench", "serve", "--base-url", echo.base_url]
        assert "openai-chat" in refusal(*base, "--backend", "tgi")
        assert "prefix_repetition" in refusal(*base, "--dataset-name", "sonnet")
        assert "--dataset-path" in refusal(*base, "--dataset-name", "custom")
        assert "ttft:200" in refusal(*base, "--goodput", "speed:1")
        assert "stray" in refusal(*base, "stray")
        assert "above 0" in refusal(*base, "--request-rate", 0)
        assert "--dataset-path" in refusal(*base, "--dataset", "sharegpt")
        assert "--ramp-up-end-rps" in refusal(*base, "--ramp-up-strategy", "linear")
        ramp = ("--ramp-up-strategy", "linear", "--ramp-up-start-rps", 1, "--ramp-up-end-rps", 2)
        assert "not both" in refusal(*base, "--request-rate", 3, *ramp)
        file = tmp_path / "boom.jsonl"
        file.write_text('{"prompt": "boom"}\n', encoding="utf-8")
        bad = [*base, "--dataset-name", "custom", "--dataset-path", file, "--num-prompts", 2]
        assert "first request failed" in refusal(*bad)
        told = run(*bad, "--num-warmups", 0, status=1)
        assert "http_500" in told.stdout
        assert "Every request failed" in told.stderr
