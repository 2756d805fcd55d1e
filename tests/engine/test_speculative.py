"""Prompt lookup: the proposer against brute force; what a sampler keeps of guesses."""

import gc
import hashlib
from dataclasses import asdict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.sampling import choose
from qoq.engine.request import Request, SamplingParams
from qoq.engine.sampler import Sampler
from qoq.engine.speculative import LookupGuesser, PromptLookup, SpeculativeConfig, guesser
from qoq.errors import RequestError

VOCAB = 11


def brute_force(ids: list[int], count: int, longest: int, shortest: int) -> list[int]:
    for size in range(longest, shortest - 1, -1):
        for end in range(len(ids) - 1, size - 1, -1):
            if len(ids) >= size and ids[end - size : end] == ids[len(ids) - size :]:
                return ids[end : end + count]
    return []


@given(
    pieces=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=8),
    count=st.integers(1, 6),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_guesses_are_those_of_brute_force(
    pieces: list[list[int]], count: int, sizes: tuple[int, int]
) -> None:
    lookup = PromptLookup(max(sizes), min(sizes))
    ids: list[int] = []
    for piece in pieces:
        ids += piece
        assert lookup.propose(ids, count) == brute_force(ids, count, max(sizes), min(sizes))


def test_each_request_is_looked_up_in_its_own_text_as_long_as_it_lives() -> None:
    config = SpeculativeConfig(3, prompt_lookup_max=2, prompt_lookup_min=2)
    guess = LookupGuesser(config)
    one, other = (Request(ids, SamplingParams(), max_length=99) for ids in ([1, 2, 3, 4, 1], [1]))
    one.ids += [2]
    other.ids += [2]
    assert guess(one, 9) == [3, 4, 1]
    assert guess(one, 2) == [3, 4]
    assert guess(other, 9) == []
    one.ids += [9, 2, 3]
    assert guess(one, 9) == [4, 1, 2]
    del one, other
    gc.collect()
    assert len(guess._lookups) == 0
    assert guesser(None) is None


def test_a_config_as_vllm_spells_it() -> None:
    given = {
        "method": "ngram",
        "num_speculative_tokens": 5,
        "prompt_lookup_max": 4,
        "prompt_lookup_min": 2,
    }
    config = SpeculativeConfig.of(given)
    assert config is not None
    assert asdict(config) == given
    assert SpeculativeConfig.of(config) is config
    tokens = {"num_speculative_tokens": 5}
    for some, sizes in (
        ({}, (3, 3)),
        ({"prompt_lookup_max": 4}, (4, 4)),
        ({"prompt_lookup_min": 2}, (2, 2)),
    ):
        assert SpeculativeConfig.of({**tokens, **some}) == SpeculativeConfig(5, *sizes)
    assert SpeculativeConfig.of(None) is None
    assert "5 tokens" in str(config)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, "num_speculative_tokens"),
        ([], "must be a mapping"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens must be from 1 to 32, not 0"),
        ({"num_speculative_tokens": 33}, "from 1 to 32"),
        ({"num_speculative_tokens": True}, "from 1 to 32"),
        ({"num_speculative_tokens": "4"}, "from 1 to 32"),
        ({"num_speculative_tokens": 4, "method": "eagle"}, 'method must be "ngram"'),
        ({"num_speculative_tokens": 4, "model": "small"}, "has no 'model'"),
        ({"num_speculative_tokens": 4, "prompt_lookup_max": 0}, "prompt_lookup_max must be"),
        (
            {"num_speculative_tokens": 4, "prompt_lookup_min": 4, "prompt_lookup_max": 3},
            "prompt_lookup_min must be",
        ),
    ],
)
def test_bad_configs_are_refused_with_a_sentence(given: Any, wanted: str) -> None:
    with pytest.raises(RequestError, match=wanted):
        SpeculativeConfig.of(given)


def logits_after(ids: list[int]) -> torch.Tensor:
    """A stand-in for a model that likes to repeat itself."""
    digest = hashlib.sha256(str(ids[-2:]).encode()).digest()
    return torch.tensor([b / 40 for b in digest[:VOCAB]])


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12),
    asked=st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.0, 0.3, 1.0]),
            "seed": st.integers(0, 2**40),
            "top_k": st.integers(0, 4),
            "logprobs": st.sampled_from([None, 0, 3]),
        },
        optional={
            "min_tokens": st.integers(0, 9),
            "logit_bias": st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-3, 3), max_size=3),
            "allowed_token_ids": st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=6),
        },
    ),
    count=st.integers(1, 5),
    eos=st.integers(0, VOCAB - 1),
)
def test_the_sampler_draws_what_it_draws_token_by_token(
    prompt: list[int], asked: dict[str, Any], count: int, eos: int
) -> None:
    """To the bit, so that no statistics are needed to say that the distribution is the same."""
    params = SamplingParams(max_tokens=25, **asked)

    def fresh() -> Request:
        return Request(prompt, params, max_length=len(prompt) + 25, eos_ids=(eos,))

    plain, guessing = fresh(), fresh()
    sampler, lookup = Sampler(VOCAB), PromptLookup(3, 1)
    while plain.finish_reason is None:
        choose(sampler, [plain], logits_after(plain.ids)[None])
    passes = 0
    while guessing.finish_reason is None:
        guessed = lookup.propose(guessing.ids, count) if guessing.guessable else []
        places = [guessing.ids + guessed[:n] for n in range(len(guessed) + 1)]
        before = guessing.num_new
        [update] = choose(
            sampler, [guessing], torch.stack([logits_after(ids) for ids in places]), [guessed]
        )
        assert list(update.token_ids) == guessing.token_ids[before:]
        passes += 1
    assert guessing.output() == plain.output()
    assert passes <= len(plain.token_ids)


def test_right_guesses_are_kept_up_to_the_first_wrong_one() -> None:
    request = Request([1, 2, 3, 4, 1, 2], SamplingParams(max_tokens=9), max_length=15)
    guessed = PromptLookup(3, 1).propose(request.ids, 4)
    assert guessed == [3, 4, 1, 2]
    logits = torch.full((5, VOCAB), -1.0)
    for row, i in enumerate([3, 4, 1, 9, 5]):
        logits[row, i] = 3.0
    [update] = choose(Sampler(VOCAB), [request], logits, [guessed])
    assert update.token_ids == (3, 4, 1, 9)
    assert request.finish_reason is None


@pytest.mark.parametrize(
    ("params", "wanted"),
    [
        ({}, True),
        ({"temperature": 1.0, "top_p": 0.5, "logprobs": 3, "stop_token_ids": [3]}, True),
        ({"logit_bias": {1: 1.0}, "allowed_token_ids": [1, 2]}, True),
        ({"min_tokens": 1}, True),
        ({"min_tokens": 2}, False),
        ({"frequency_penalty": 1.0}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"bad_words": ["a"]}, False),
    ],
)
def test_no_guesses_where_a_rule_hangs_on_the_text(params: dict[str, Any], wanted: bool) -> None:
    request = Request([1, 1], SamplingParams(**params), max_length=12)
    request.accept(1, 0.0)
    assert request.guessable is wanted
