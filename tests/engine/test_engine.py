"""Engine: paging, chunks, order, batch independence; the decoder is a hash of its cache."""

import hashlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qoq.engine.engine import PREFILL_CHUNK, Engine, check_length, pages_needed
from qoq.engine.request import Request, SamplingParams
from qoq.errors import RequestError
from qoq.formats.scheme import KVFormat
from qoq.kvcache.pool import KVPool
from qoq.models.batch import Batch

VOCAB = 61
PAGE = 4
EOS = 7


def next_token(sequence: Sequence[int]) -> int:
    """What the stub decoder finds likeliest after ``sequence``."""
    digest = hashlib.sha256(str(list(sequence)).encode()).digest()
    return digest[0] % VOCAB


class HashDecoder:
    """Remembers each slot's token and finds a sequence only through the page table."""

    def __init__(self, max_positions: int = 4096) -> None:
        self.config = SimpleNamespace(max_positions=max_positions, vocab_size=VOCAB)
        self.cache: dict[int, tuple[int, int]] = {}
        self.batches: list[Batch] = []

    def __call__(
        self, batch: Batch, kv: Sequence[Any], rows: torch.Tensor, *, backend: str
    ) -> torch.Tensor:
        assert backend == "oracle"
        self.batches.append(batch)
        written = batch.slots.tolist()
        assert len(set(written)) == len(written), "two rows share a slot"
        for slot, token, at in zip(
            written, batch.input_ids.tolist(), batch.positions.tolist(), strict=True
        ):
            self.cache[slot] = (token, at)
        ends = batch.cu_seqlens_q.tolist()
        answers = {}
        for s, length in enumerate(batch.kv_lens.tolist()):
            table = batch.page_table[s].tolist()
            slots = [table[at // PAGE] * PAGE + at % PAGE for at in range(length)]
            tokens, positions = zip(*(self.cache[slot] for slot in slots), strict=True)
            assert list(positions) == list(range(length))
            answers[ends[s + 1] - 1] = next_token(tokens)
        logits = torch.zeros(len(rows), VOCAB)
        for i, row in enumerate(rows.tolist()):
            logits[i, answers[row]] = 5.0
        return logits


def engine(num_pages: int = 64, decoder: HashDecoder | None = None, **options: Any) -> Engine:
    pool = KVPool(
        KVFormat(4, 4),
        num_layers=1,
        num_pages=num_pages,
        num_kv_heads=1,
        page_size=PAGE,
        head_dim=2,
    )
    return Engine(decoder or HashDecoder(), pool, backend="oracle", **options)  # type: ignore[arg-type]


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
    assert e._allocator.num_free == num_pages


def test_long_prompts_are_read_in_chunks_that_depend_on_nothing_else() -> None:
    long = [i % VOCAB for i in range(2 * PREFILL_CHUNK + 10)]
    lengths = []
    for others in ([], [[3]] * 3, [long, [1, 2]]):
        decoder = HashDecoder()
        e = engine(2000, decoder, max_step_tokens=PREFILL_CHUNK)
        for prompt in others:
            e.add(prompt, SamplingParams(max_tokens=9))
        request = e.add(long, SamplingParams(max_tokens=3))
        run(e)
        assert request.token_ids == expected(long, 3)
        ends = {PREFILL_CHUNK, 2 * PREFILL_CHUNK, len(long)}
        lengths.append([int(n) for b in decoder.batches for n in b.kv_lens if int(n) in ends])
        rows = max(b.num_tokens for b in decoder.batches)
        assert rows <= PREFILL_CHUNK + 64
    assert lengths[0] == lengths[1] == [PREFILL_CHUNK, 2 * PREFILL_CHUNK, len(long)]


def test_generating_requests_go_on_while_a_prompt_is_read() -> None:
    e = engine(2000, max_requests=2, max_step_tokens=1)
    quick = e.add([1], SamplingParams(max_tokens=4))
    slow = e.add([2] * (3 * PREFILL_CHUNK), SamplingParams(max_tokens=1))
    e.step()
    for _ in range(3):
        before = quick.num_new
        e.step()
        assert quick.num_new == before + 1
    run(e)
    assert slow.finish_reason == "length"


def test_eos_ends_a_request_and_frees_its_pages_for_the_next() -> None:
    prompt = next([i] for i in range(VOCAB) if expected([i], 30)[29] != EOS)
    stop = expected(prompt, 6)
    e = engine(num_pages=8, eos_ids=[stop[5]])
    first = e.add(prompt, SamplingParams(max_tokens=30))
    second = e.add(prompt, SamplingParams(max_tokens=12, ignore_eos=True))
    third = e.add(prompt, SamplingParams(max_tokens=12, stop_token_ids=[stop[0]], ignore_eos=True))
    e.step()
    assert (first.num_new, second.num_new, third.num_new) == (1, 0, 0)
    run(e)
    assert first.finish_reason == "stop"
    assert first.token_ids == stop[: stop.index(stop[5]) + 1]
    assert (second.finish_reason, second.num_new) == ("length", 12)
    assert (third.finish_reason, third.token_ids) == ("stop", stop[:1])


def test_first_come_first_served() -> None:
    e = engine(num_pages=8)
    big = e.add([1] * 20, SamplingParams(max_tokens=2))
    bigger = e.add([1] * 25, SamplingParams(max_tokens=2))
    small = e.add([1], SamplingParams(max_tokens=2))
    e.step()
    assert (big.num_new, bigger.num_new, small.num_new) == (1, 0, 0)
    run(e)
    assert small.finish_reason == "length"


def test_abort_waiting_and_running() -> None:
    e = engine(num_pages=4)
    running = e.add([1, 2, 3], SamplingParams(max_tokens=10))
    waiting = e.add([1, 2, 3], SamplingParams(max_tokens=10))
    e.step()
    e.abort(waiting)
    e.abort(running)
    assert e.unfinished == 0
    assert e._allocator.num_free == 4
    assert running.output().finish_reason == waiting.output().finish_reason == "abort"
    assert running.num_new == 1
    assert e.step() == []
    e.abort(running)  # nothing is left to free
    last = e.add([1], SamplingParams(max_tokens=2))
    run(e)
    e.abort(last)
    assert last.finish_reason == "length"


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
