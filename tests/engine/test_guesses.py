"""Guesses in the engine, right and wrong: no bit of any answer changes."""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.packed import write_random_packed
from helpers.stub_decoder import StubDecoder, stub_engine
from helpers.tiny import EOS, write_byte_tokenizer
from qoq import LLM, SamplingParams
from qoq.engine.engine import Engine
from qoq.engine.request import Output, Request
from qoq.engine.speculative import LookupGuesser, SpeculativeConfig
from qoq.engine.structured_params import StructuredOutputsParams
from qoq.kernels.cpu import backend as cpu
from qoq.tokenizer import Tokenizer

needs_cpu = pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))
BACKENDS = [pytest.param("cpu", marks=needs_cpu), "oracle"]


class Echo:
    """A model of few words that likes to say them again; each number hangs on the whole text."""

    def __init__(self, folder: Path) -> None:
        write_byte_tokenizer(folder)
        self.tokenizer = Tokenizer.load(folder)
        letters = [self.tokenizer.encode(letter, special=False)[0] for letter in "abcd"]
        self.words = [*letters, letters[0], letters[1], letters[2], EOS]

    def logits_after(self, ids: Sequence[int]) -> torch.Tensor:
        whole = hashlib.sha256(str(list(ids)).encode()).digest()
        noise = np.random.default_rng(list(whole[:8])).random(len(self.tokenizer))
        logits = torch.from_numpy(noise).float()
        digest = hashlib.sha256(str(list(ids[-2:])).encode()).digest()
        logits[self.words[digest[0] % 8]] += 9
        logits[self.words[digest[1] % 8]] += 7
        return logits

    def engine(self, num_pages: int = 64, **options: Any) -> Engine:
        decoder = StubDecoder(len(self.tokenizer), self.logits_after)
        return stub_engine(decoder, num_pages, tokenizer=self.tokenizer, eos_ids=[EOS], **options)

    def alone(self, prompt: str, params: SamplingParams) -> Output:
        """The answer without company and without guesses."""
        engine = self.engine()
        request = engine.add(self.tokenizer.encode(prompt), params)
        while engine.unfinished:
            engine.step()
        return request.output()


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Echo:
    return Echo(tmp_path_factory.mktemp("echo"))


def run(engine: Engine, between: Callable[[], None] = lambda: None) -> None:
    """Step to the end; what the updates tell must be what the requests hold."""
    told: dict[Request, tuple[tuple[int, ...], str]] = {}
    while engine.unfinished:
        updates = engine.step()
        assert len({update.request for update in updates}) == len(updates)
        for update in updates:
            ids, text = told.get(update.request, ((), ""))
            told[update.request] = (ids + update.token_ids, text + update.text)
            got = (tuple(update.request.token_ids), update.request.text)
            assert told[update.request] == got
        between()
    assert engine.stats().kv_pages_used == 0


params = st.fixed_dictionaries(
    {
        "max_tokens": st.integers(5, 20),
        "temperature": st.sampled_from([0.0, 0.0, 0.7, 2.0]),
        "seed": st.integers(0, 2**62),
    },
    optional={
        "top_k": st.integers(1, 3),
        "stop": st.sampled_from(["ab", ["dab", "bc"], ["cabc"]]),
        "stop_token_ids": st.sampled_from([[], [EOS], [3]]),
        "ignore_eos": st.just(True),
        "min_tokens": st.integers(0, 5),
        "logprobs": st.sampled_from([0, 3]),
        "logit_bias": st.sampled_from([{}, {EOS: -5.0}]),
        "frequency_penalty": st.just(0.5),
    },
)


@settings(max_examples=80, deadline=None)
@given(
    asked=st.lists(
        st.tuples(st.text("abcd", min_size=1, max_size=20), params), min_size=1, max_size=5
    ),
    num_pages=st.integers(11, 30),
    max_requests=st.integers(1, 4),
    max_step_tokens=st.integers(1, 60),
    caching=st.booleans(),
    many=st.integers(1, 6),
    informed=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_every_answer_is_the_one_without_guesses(
    echo: Echo,
    asked: list[tuple[str, dict[str, Any]]],
    num_pages: int,
    max_requests: int,
    max_step_tokens: int,
    caching: bool,
    many: int,
    informed: bool,
    seed: int,
) -> None:
    """Tokens, texts and log-probabilities are equal to the bit, greedy or sampled; so the
    distribution is the same too, and no statistics are needed to say so.
    """
    wanted = [echo.alone(prompt, SamplingParams(**own)) for prompt, own in asked]
    draw = random.Random(seed)
    answers: dict[Request, Output] = {}
    lookup = LookupGuesser(SpeculativeConfig(many, 3, 1))

    def guess(request: Request, count: int) -> list[int]:
        if not informed:
            return lookup(request, count)
        ids = answers[request].token_ids[request.num_new :][: draw.randint(0, min(count, many))]
        if ids and draw.random() < 0.4:
            ids[draw.randrange(len(ids))] = draw.randrange(9)
        return ids

    engine = echo.engine(
        num_pages,
        guess=guess,
        max_requests=max_requests,
        max_step_tokens=max_step_tokens,
        enable_prefix_caching=caching,
    )
    requests = [
        engine.add(echo.tokenizer.encode(prompt), SamplingParams(**own)) for prompt, own in asked
    ]
    answers.update(zip(requests, wanted, strict=True))

    def between() -> None:
        one = draw.choice(requests)
        if draw.random() < 0.1:
            engine.preempt(one)
        elif draw.random() < 0.05:
            engine.abort(one)

    run(engine, between)
    for request, output in answers.items():
        got = request.output()
        if got.finish_reason == "abort":
            count = len(got.token_ids)
            assert got.token_ids == output.token_ids[:count]
            assert got.logprobs == output.logprobs[:count]
            assert output.text.startswith(got.text)
        else:
            assert got == output
    stats = engine.stats()
    assert 0 <= stats.accepted_tokens <= stats.draft_tokens
    assert stats.generation_tokens == sum(request.num_new for request in requests)


def test_guesses_are_accepted_and_refused_and_save_steps(echo: Echo) -> None:
    asked = [("abcd" * 5 + "ab", {}), ("ddd", {"temperature": 1.0, "seed": 3}), ("cab", {})]
    steps = {}
    outputs = {}
    for guess in (None, LookupGuesser(SpeculativeConfig(4))):
        engine = echo.engine(guess=guess)
        requests = [
            engine.add(
                echo.tokenizer.encode(prompt),
                SamplingParams(max_tokens=60, ignore_eos=True, logprobs=2, **own),
            )
            for prompt, own in asked
        ]
        run(engine)
        steps[guess is not None] = engine.stats().steps
        outputs[guess is not None] = [request.output() for request in requests]
    assert outputs[True] == outputs[False]
    stats = engine.stats()
    assert 60 < stats.accepted_tokens < stats.draft_tokens
    assert steps[True] < 0.7 * steps[False] == 0.7 * 60


def guess_zeros(request: Request, count: int) -> list[int]:
    return [0] * count


def test_guesses_get_what_prompts_leave_of_a_step(echo: Echo) -> None:
    budget = 20
    steps = []
    for guess in (None, guess_zeros):
        engine = echo.engine(100, guess=guess, max_requests=3, max_step_tokens=budget)
        params = SamplingParams(max_tokens=60, ignore_eos=True)
        for _ in range(2):
            engine.add(echo.tokenizer.encode("ab"), params)
        engine.step()
        long = engine.add(echo.tokenizer.encode("ab" * 60), SamplingParams(max_tokens=1))
        before = engine.stats().steps
        while long.finish_reason is None:
            engine.step()
            assert engine.stats().step_tokens <= budget
        steps.append(engine.stats().steps - before)
        engine.step()
        assert engine.stats().step_tokens == (2 if guess is None else budget)
    assert steps[0] == steps[1]


@pytest.mark.parametrize("guessing", [False, True])
def test_right_guesses_leave_others_their_next_page(echo: Echo, guessing: bool) -> None:
    params = SamplingParams(max_tokens=14, ignore_eos=True)
    coming = echo.alone("abc", params).token_ids

    def guess(request: Request, count: int) -> list[int]:
        return coming[request.num_new :][: min(count, 7)] if request is quick else []

    # Both together want six pages of four tokens, but not at once unless one runs ahead.
    engine = echo.engine(4, guess=guess if guessing else None)
    slow = engine.add(echo.tokenizer.encode("dcba"), SamplingParams(max_tokens=2, ignore_eos=True))
    quick = engine.add(echo.tokenizer.encode("abc"), params)
    run(engine)
    assert engine.stats().preemptions == 0
    assert (engine.stats().accepted_tokens > 4) == guessing
    assert (slow.num_new, quick.token_ids) == (2, coming)


def test_no_more_is_guessed_than_may_still_be_written(echo: Echo) -> None:
    asked: list[int] = []

    def guess(request: Request, count: int) -> list[int]:
        asked.append(count)
        assert count == request.max_length - len(request.ids) - 1
        return []

    engine = echo.engine(guess=guess)
    engine.add(echo.tokenizer.encode("abc"), SamplingParams(max_tokens=5, ignore_eos=True))
    run(engine)
    assert asked == [4, 3, 2, 1]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_packed(tmp_path_factory.mktemp("packed"))


PROMPTS = ["hello world, hello world, hello", "abcabcabc", "t", "the well told the hat " * 6]
SPECULATIVE = {"num_speculative_tokens": 4}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_says_the_same_to_the_bit(
    packed: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy and sampled, guessed for or not in one batch; chunks, a warm cache, too few pages."""
    kinds = [
        SamplingParams(max_tokens=40, ignore_eos=True),
        SamplingParams(max_tokens=40, temperature=0.5, top_p=0.9, seed=7, logprobs=3),
        SamplingParams(max_tokens=20, temperature=1.0, seed=8, frequency_penalty=0.3),
        SamplingParams(max_tokens=30, prompt_logprobs=1, logit_bias={70: 1.0}, min_tokens=3),
        SamplingParams(max_tokens=20, structured_outputs=StructuredOutputsParams(regex="(ab|c)+")),
    ]
    prompts = [prompt for prompt in PROMPTS for _ in kinds]
    each = kinds * len(PROMPTS)
    plain = LLM(packed, backend=backend, max_requests=1).generate(prompts, each)
    guessing = LLM(packed, backend=backend, speculative_config=SPECULATIVE)
    assert guessing.generate(prompts, each) == plain
    assert guessing.generate(prompts, each) == plain  # its prompts are cached
    stats = guessing._engine.stats()  # type: ignore[union-attr]
    assert 50 < stats.accepted_tokens < stats.draft_tokens
    monkeypatch.setattr("qoq.llm.Engine", partial(Engine, max_step_tokens=9))
    monkeypatch.setattr("qoq.llm.PAGE_SIZE", 16)
    crowded = LLM(packed, backend=backend, speculative_config=SPECULATIVE, kv_tokens=11 * 16)
    assert crowded.generate(prompts, each) == plain
    stats = crowded._engine.stats()  # type: ignore[union-attr]
    assert 0 < stats.accepted_tokens < stats.draft_tokens
    assert stats.preemptions > 0


def test_streams_and_stop_strings(packed: Path) -> None:
    plain, guessing = LLM(packed), LLM(packed, speculative_config=SPECULATIVE)
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    for prompt in PROMPTS:
        [wanted] = plain.generate(prompt, params)
        assert "".join(guessing.stream(prompt, params)) == wanted.text
        updates = list(guessing.stream_updates(prompt, params))
        assert [i for update in updates for i in update.token_ids] == wanted.token_ids
        for start in range(0, len(wanted.text) - 4, 7):
            stop = wanted.text[start : start + 4]
            stopping = SamplingParams(max_tokens=60, ignore_eos=True, stop=stop)
            assert guessing.generate(prompt, stopping) == plain.generate(prompt, stopping)
    assert any(len(update.token_ids) > 1 for update in updates)


@pytest.fixture(autouse=True)
def _quiet_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
