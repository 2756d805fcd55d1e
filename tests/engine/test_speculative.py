"""Prompt lookup: the proposer against brute force, the text against decoding token by token."""

import hashlib

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qoq.engine.request import Request, SamplingParams
from qoq.engine.sampler import Sampler
from qoq.engine.speculative import PromptLookup, guesses, verify

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
    lookup = PromptLookup(max_ngram=max(sizes), min_ngram=min(sizes))
    ids: list[int] = []
    for piece in pieces:
        ids += piece
        assert lookup.propose(ids, count) == brute_force(ids, count, max(sizes), min(sizes))


def logits_after(ids: list[int]) -> torch.Tensor:
    """A stand-in for a model that likes to repeat itself."""
    digest = hashlib.sha256(str(ids[-2:]).encode()).digest()
    return torch.tensor([b / 40 for b in digest[:VOCAB]])


@settings(max_examples=30, deadline=None)
@given(
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12),
    temperature=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**40),
    top_k=st.integers(0, 4),
    count=st.integers(0, 5),
    eos=st.integers(0, VOCAB - 1),
)
def test_text_is_that_of_decoding_token_by_token(
    prompt: list[int], temperature: float, seed: int, top_k: int, count: int, eos: int
) -> None:
    params = SamplingParams(max_tokens=25, temperature=temperature, seed=seed, top_k=top_k)

    def fresh() -> Request:
        return Request(prompt, params, max_length=len(prompt) + 25, eos_ids=(eos,))

    plain, guessing = fresh(), fresh()
    sampler, lookup = Sampler(VOCAB), PromptLookup()
    while plain.finish_reason is None:
        sampler.choose([plain], logits_after(plain.ids)[None])
    passes = 0
    while guessing.finish_reason is None:
        guessed = guesses(guessing, lookup, count)
        places = [guessing.ids + guessed[:n] for n in range(len(guessed) + 1)]
        logits = torch.stack([logits_after(ids) for ids in places])
        for token_id, logprob in verify(guessing, logits, guessed):
            guessing.accept(token_id, logprob)
            if guessing.finish_reason is not None:
                break
        passes += 1
    assert guessing.output() == plain.output()
    assert passes <= len(plain.token_ids)


def test_repetition_takes_fewer_passes() -> None:
    r = Request([1, 2, 3, 4, 1, 2], SamplingParams(max_tokens=9), max_length=15)
    assert guesses(r, PromptLookup(), 5) == [3, 4, 1, 2]
    assert guesses(r, PromptLookup(), 2) == [3, 4]
    logits = torch.full((5, VOCAB), -1.0)
    for row, i in enumerate([3, 4, 1, 9, 5]):
        logits[row, i] = 3.0
    assert [i for i, _ in verify(r, logits, [3, 4, 1, 2])] == [3, 4, 1, 9]


def test_no_guesses_where_they_cannot_be_used() -> None:
    params = SamplingParams(max_tokens=9, frequency_penalty=1.0)
    assert guesses(Request([1, 1, 1], params, max_length=12), PromptLookup(), 3) == []
    last = Request([1, 1, 1], SamplingParams(max_tokens=1), max_length=4)
    assert guesses(last, PromptLookup(), 3) == []
