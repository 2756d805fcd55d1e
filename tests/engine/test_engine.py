"""Engine: paging, chunks, order, batch independence; the decoder is a hash of its cache."""

import gc
import hashlib
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.stub_decoder import PAGE, StubDecoder, stub_engine
from qoq.engine.choices import choices
from qoq.engine.engine import Engine, check_length, pages_needed
from qoq.engine.request import Request, SamplingParams
from qoq.engine.speculative import SpeculativeConfig, guesser
from qoq.errors import RequestError

VOCAB = 61
EOS = 7


def next_token(sequence: Sequence[int]) -> int:
    """What the stub decoder finds likeliest after ``sequence``."""
    digest = hashlib.sha256(str(list(sequence)).encode()).digest()
    return digest[0] % VOCAB


def hashed(sequence: Sequence[int]) -> torch.Tensor:
    logits = torch.zeros(VOCAB)
    logits[next_token(sequence)] = 5.0
    return logits


class HashDecoder(StubDecoder):
    """Each text goes on as its hash says."""

    def __init__(self, max_positions: int = 4096) -> None:
        super().__init__(VOCAB, hashed, max_positions)


def engine(num_pages: int = 64, decoder: HashDecoder | None = None, **options: Any) -> Engine:
    return stub_engine(decoder or HashDecoder(), num_pages, **options)


def expected(prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    while len(ids) < len(prompt) + count:
        ids.append(next_token(ids))
    return ids[len(prompt) :]


def run(engine: Engine) -> int:
    """Steps until nothing is left; how many it took."""
    steps = 0
    while engine.unfinished:
        engine.step()
        steps += 1
        assert steps < 10_000
    return steps


@given(
    asked=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20)), min_size=1, max_size=7),
    num_pages=st.integers(13, 40),
    max_requests=st.integers(1, 4),
    max_step_tokens=st.integers(1, 600),
    seed=st.integers(0, 2**31),
)
def test_every_request_gets_its_own_tokens(
    asked: list[tuple[int, int]],
    num_pages: int,
    max_requests: int,
    max_step_tokens: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    e = engine(num_pages, max_requests=max_requests, max_step_tokens=max_step_tokens)
    requests = []
    for length, count in asked:
        prompt = torch.randint(VOCAB, (length,), generator=generator).tolist()
        requests.append(e.add(prompt, SamplingParams(max_tokens=count)))
    run(e)
    for request, (_, count) in zip(requests, asked, strict=True):
        assert request.token_ids == expected(request.prompt_ids, count)
        assert request.finish_reason == "length"
        assert len(request.logprobs) == count
        assert request.pages == []
    assert e.stats().kv_pages_used == 0


def test_a_step_reads_what_its_budget_holds_and_generating_requests_go_first() -> None:
    decoder = HashDecoder()
    e = engine(2000, decoder, max_requests=4, max_step_tokens=20)
    quick = [e.add([i], SamplingParams(max_tokens=30)) for i in range(3)]
    e.step()
    long = [i % VOCAB for i in range(101)]
    slow = e.add(long, SamplingParams(max_tokens=3))
    while slow.num_new == 0:
        before = [request.num_new for request in quick]
        e.step()
        assert [request.num_new for request in quick] == [n + 1 for n in before]
        assert decoder.batches[-1].num_tokens <= 20
    assert len(decoder.batches) == 1 + -(-101 // 17)
    run(e)
    assert slow.token_ids == expected(long, 3)


def test_a_long_prompt_neither_holds_up_short_ones_nor_waits_for_them() -> None:
    e = engine(2000, max_requests=8, max_step_tokens=40, enable_prefix_caching=False)
    long = e.add([3] * 400, SamplingParams(max_tokens=1))
    shorts, steps = [], 0
    while long.finish_reason is None:
        shorts.append(e.add([steps % VOCAB] * 10, SamplingParams(max_tokens=1)))
        e.step()
        steps += 1
        assert all(request.finish_reason for request in shorts)
    assert steps <= 400 // 20 + 1


def test_eos_ends_a_request_and_frees_its_pages_for_the_next() -> None:
    prompt = next([i] for i in range(VOCAB) if expected([i], 30)[29] != EOS)
    stop = expected(prompt, 6)
    e = engine(num_pages=8, eos_ids=[stop[5]])
    first = e.add(prompt, SamplingParams(max_tokens=30))
    second = e.add(prompt, SamplingParams(max_tokens=12, ignore_eos=True))
    third = e.add(prompt, SamplingParams(max_tokens=12, stop_token_ids=[stop[0]], ignore_eos=True))
    run(e)
    assert first.finish_reason == "stop"
    assert first.token_ids == stop[: stop.index(stop[5]) + 1]
    assert (second.finish_reason, second.num_new) == ("length", 12)
    assert (third.finish_reason, third.token_ids) == ("stop", stop[:1])
    assert e.stats().finished == {"stop": 2, "length": 1}


def test_first_come_first_served() -> None:
    e = engine(num_pages=8, enable_prefix_caching=False)
    big = e.add([1] * 20, SamplingParams(max_tokens=2))
    bigger = e.add([1] * 25, SamplingParams(max_tokens=2))
    small = e.add([1], SamplingParams(max_tokens=2))
    e.step()
    assert (big.num_new, bigger.num_new, small.num_new) == (1, 0, 0)
    run(e)
    assert small.finish_reason == "length"


def test_abort_waiting_and_running() -> None:
    e = engine(num_pages=4, max_requests=1)
    running = e.add([1, 2, 3], SamplingParams(max_tokens=10))
    waiting = e.add([1, 2, 3], SamplingParams(max_tokens=10))
    e.step()
    assert (e.stats().running, e.stats().waiting) == (1, 1)
    e.abort(waiting)
    e.abort(running)
    assert e.unfinished == 0
    assert e.stats().kv_pages_used == 0
    assert running.output().finish_reason == waiting.output().finish_reason == "abort"
    assert running.num_new == 1
    assert running.finish_time is not None
    assert e.step() == []
    e.abort(running)  # nothing is left to free
    last = e.add([1], SamplingParams(max_tokens=2))
    run(e)
    e.abort(last)
    assert last.finish_reason == "length"


def test_a_full_cache_throws_out_the_youngest_and_changes_no_token() -> None:
    e = engine(num_pages=10)
    requests = [e.add([i] * 5, SamplingParams(max_tokens=30)) for i in range(4)]
    order = []
    while e.unfinished:
        e.step()
        order += [r for r in requests if r.finish_reason and r not in order]
    assert order == requests
    assert requests[0].num_preemptions == 0
    assert e.stats().preemptions == sum(r.num_preemptions for r in requests) > 0
    for i, request in enumerate(requests):
        assert request.token_ids == expected([i] * 5, 30)


def test_priorities_go_first_and_take_the_place_of_others() -> None:
    e = engine(num_pages=8, max_requests=2, enable_prefix_caching=False)
    low = [e.add([i] * 9, SamplingParams(max_tokens=8), priority=5) for i in range(3)]
    e.step()
    assert [r.num_new for r in low] == [1, 1, 0]
    urgent = e.add([7] * 9, SamplingParams(max_tokens=8), priority=-1)
    e.step()
    assert (urgent.num_new, low[1].num_preemptions, low[1].num_new) == (1, 1, 1)
    run(e)
    for i, request in enumerate(low):
        assert request.token_ids == expected([i] * 9, 8)


@pytest.mark.parametrize("caching", [True, False])
def test_a_prompt_seen_before_is_not_computed_again(caching: bool) -> None:
    decoder = HashDecoder()
    e = engine(64, decoder, enable_prefix_caching=caching)
    prompt = [i % VOCAB for i in range(18)]
    first = e.add(prompt, SamplingParams(max_tokens=5))
    run(e)
    before = sum(batch.num_tokens for batch in decoder.batches)
    second = e.add(prompt, SamplingParams(max_tokens=5))
    longer = e.add(prompt + first.token_ids + [4], SamplingParams(max_tokens=2))
    salted = e.add(prompt, SamplingParams(max_tokens=5), cache_salt="another")
    run(e)
    assert second.token_ids == salted.token_ids == first.token_ids
    assert longer.token_ids == expected(prompt + first.token_ids + [4], 2)
    cached = [r.num_cached_prompt_tokens for r in (first, second, longer, salted)]
    assert cached == ([0, 16, 20, 0] if caching else [0, 0, 0, 0])
    read = sum(batch.num_tokens for batch in decoder.batches) - before
    assert read == 18 + 4 + 24 + 1 + 18 + 4 - sum(cached)
    stats = e.stats()
    assert (stats.prefix_hits, stats.prefix_queries) == ((36, 78) if caching else (0, 0))
    assert (stats.prompt_tokens, stats.generation_tokens) == (78, 17)


def test_the_last_token_of_a_cached_prompt_is_computed() -> None:
    e = engine()
    prompt = [5] * (2 * PAGE)
    for cached in (0, PAGE, PAGE):
        request = e.add(prompt, SamplingParams(max_tokens=3))
        run(e)
        assert request.token_ids == expected(prompt, 3)
        assert request.num_cached_prompt_tokens == cached


def test_choices_of_one_prompt_share_its_pages() -> None:
    decoder = HashDecoder()
    e = engine(40, decoder)
    prompt = [i % VOCAB for i in range(4 * PAGE + 2)]
    params = SamplingParams(max_tokens=6, temperature=20.0, seed=2**63 - 1)
    samples = [e.add(prompt, own) for own in choices(replace(params, n=5))]
    stranger = e.add([9] * 3, params)
    e.step()
    assert stranger.num_new == samples[0].num_new == 1
    e.step()
    used = e.stats().kv_pages_used
    assert used <= 4 + 5 * 1 + 2
    run(e)
    assert sum(b.num_tokens for b in decoder.batches) == 4 * PAGE + 5 * (2 + 5) + 3 + 5
    assert len({tuple(r.token_ids) for r in samples}) == 5
    single = engine()
    alone = single.add(prompt, samples[3].params)
    run(single)
    assert alone.token_ids == samples[3].token_ids


def test_times_of_a_request() -> None:
    e = engine()
    request = e.add([1, 2], SamplingParams(max_tokens=3))
    assert (request.first_token_time, request.finish_time) == (None, None)
    run(e)
    assert request.first_token_time is not None
    assert request.finish_time is not None
    assert request.arrival_time <= request.first_token_time <= request.finish_time


def test_max_model_len_bounds_prompt_and_new_tokens() -> None:
    e = engine(max_model_len=12)
    request = e.add([1] * 7, SamplingParams(max_tokens=50))
    run(e)
    assert (request.num_new, request.finish_reason) == (5, "length")
    with pytest.raises(RequestError, match="context is 12"):
        e.add([1] * 12, SamplingParams())
    with pytest.raises(RequestError, match="max_model_len must be"):
        engine(max_model_len=5000)


def test_context_ends_a_text() -> None:
    e = engine(decoder=HashDecoder(max_positions=10))
    request = e.add([1] * 7, SamplingParams(max_tokens=50))
    run(e)
    assert (request.num_new, request.finish_reason) == (3, "length")


def test_refusals() -> None:
    e = engine(num_pages=3, decoder=HashDecoder(max_positions=20))
    params = SamplingParams(max_tokens=5)
    with pytest.raises(RequestError, match=r"21 tokens.*context is 20"):
        e.add([1] * 21, params)
    with pytest.raises(RequestError, match=r"20 tokens.*context is 20"):
        e.add([1] * 20, params)
    with pytest.raises(RequestError, match="empty"):
        e.add([], params)
    for strange in (-1, VOCAB):
        with pytest.raises(RequestError, match=f"{strange} is outside this model's vocabulary"):
            e.add([1, strange], params)
    with pytest.raises(RequestError, match="needs 4 KV pages; the cache has 3"):
        e.add([1] * 9, params)
    assert e.unfinished == 0
    assert e.step() == []


def test_lengths_and_pages() -> None:
    assert check_length([1, 2], SamplingParams(max_tokens=3), 100) == 5
    assert check_length([1, 2], SamplingParams(max_tokens=300), 100) == 100
    assert [pages_needed(n, 4) for n in (1, 2, 5, 6, 9, 10)] == [1, 1, 1, 2, 2, 3]


def test_sampling_parameters_stay_with_their_request() -> None:
    """A batch of different requests samples what each samples alone."""

    def tokens(e: Engine, wanted: Sequence[tuple[list[int], SamplingParams]]) -> list[Request]:
        requests = [e.add(prompt, params) for prompt, params in wanted]
        run(e)
        return requests

    wanted = [
        ([i % 5], SamplingParams(max_tokens=8, temperature=3.0 * (i % 3), seed=i, top_k=i % 4))
        for i in range(9)
    ]
    together = tokens(engine(), wanted)
    alone = [tokens(engine(), [one])[0] for one in wanted]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    assert [r.logprobs for r in together] == [r.logprobs for r in alone]
    hot = [
        r for r, (prompt, p) in zip(alone, wanted, strict=True) if p.temperature and p.top_k != 1
    ]
    assert any(r.token_ids != expected(r.prompt_ids, 8) for r in hot), "nothing was sampled"
    greedy = [r for r, (_, p) in zip(alone, wanted, strict=True) if p.temperature == 0]
    assert all(r.token_ids == expected(r.prompt_ids, 8) for r in greedy)


@pytest.mark.parametrize("leaves", [False, True])
@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"temperature": 1.0, "top_p": 0.9, "logprobs": 2},
        {"repetition_penalty": 1.5},
        {"presence_penalty": 1.0, "stop_token_ids": [3]},
        {"min_tokens": 2, "logit_bias": {5: 3.0}, "allowed_token_ids": [3, 5, 7]},
    ],
)
def test_nothing_holds_a_request_that_is_over(asked: dict[str, Any], leaves: bool) -> None:
    """Else a server grows with every request, until it dies."""
    e = engine(guess=guesser(SpeculativeConfig(2, prompt_lookup_min=1)))
    requests = [e.add([1, 2, 3], SamplingParams(max_tokens=9, **asked)) for _ in range(3)]
    held = [weakref.ref(request) for request in requests]
    for _ in range(3):
        e.step()
    if leaves:
        for request in requests:
            e.abort(request)
    run(e)
    assert all(request.finish_reason for request in requests)
    del requests
    if leaves:
        del request
    gc.collect()
    assert [ref() for ref in held] == [None] * 3
