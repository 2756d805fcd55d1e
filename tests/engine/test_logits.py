"""Rules on logits: each against plain Python, whatever else is in the batch."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.sampling import choose
from helpers.tiny import EOS, write_byte_tokenizer
from qoq.engine.logits import LogitsRules
from qoq.engine.request import Request, SamplingParams
from qoq.engine.sampler import Sampler
from qoq.errors import RequestError
from qoq.tokenizer import Tokenizer

VOCAB = 19
CPU = torch.device("cpu")
F = np.float32


def request(prompt: list[int], new: list[int], **params: Any) -> Request:
    r = Request(prompt, SamplingParams(**params), max_length=10**6, eos_ids=(EOS,))
    r.ids += new
    return r


def reference(logits: list[float], r: Request) -> list[float]:
    """Every rule but bad words and structure, one logit at a time, in fp32."""
    p, new = r.params, r.token_ids
    out = []
    for i, value in enumerate(logits):
        x = F(value)
        if p.allowed_token_ids is not None and i not in p.allowed_token_ids:
            x = F(-math.inf)
        if len(new) < p.min_tokens and i in r.end_ids:
            x = F(-math.inf)
        x = x + F((p.logit_bias or {}).get(i, 0))
        if (i in r.ids and p.repetition_penalty != 1) or i in new:
            repetition = F(p.repetition_penalty)
            x = x / repetition if x > 0 else x * repetition
        if i in new:
            x = x - F(p.frequency_penalty) * F(new.count(i))
            x = x - F(p.presence_penalty)
        out.append(float(x))
    return logits if all(x == -math.inf for x in out) else out


ids = st.integers(0, VOCAB - 1)
rules = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.floats(0.5, 2, width=32),
        "frequency_penalty": st.floats(-2, 2, width=32),
        "presence_penalty": st.floats(-2, 2, width=32),
        "logit_bias": st.dictionaries(ids, st.floats(-100, 100, width=32), max_size=5),
        "allowed_token_ids": st.lists(ids, min_size=3, max_size=8),
        "min_tokens": st.integers(0, 6),
        "stop_token_ids": st.lists(ids, max_size=2),
        "logprobs": st.sampled_from([None, 0, 3]),
        "temperature": st.sampled_from([0.0, 1.0]),
    },
)
texts = st.tuples(st.lists(ids, min_size=1, max_size=9), st.lists(ids, max_size=9), rules)


@given(asked=st.lists(texts, min_size=1, max_size=5), seed=st.integers(0, 2**31))
def test_rules_are_those_of_plain_python(asked: list[Any], seed: int) -> None:
    requests = [request(prompt, new, **params) for prompt, new, params in asked]
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(requests), VOCAB, generator=generator) * 4
    wanted = [reference(row.tolist(), r) for row, r in zip(logits, requests, strict=True)]
    LogitsRules(VOCAB).apply(logits, list(range(len(requests))), requests)
    assert logits.tolist() == wanted


@given(text=texts, seed=st.integers(0, 2**31))
def test_counting_step_by_step_is_counting_at_once(text: Any, seed: int) -> None:
    prompt, new, params = text
    row = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(seed))
    slow, once = request(prompt, [], **params), request(prompt, new, **params)
    grown, fresh = LogitsRules(VOCAB), LogitsRules(VOCAB)
    for i in [None, *new]:
        if i is not None:
            slow.ids.append(i)
        logits = row.clone()
        grown.apply(logits, [0], [slow])
    whole = row.clone()
    fresh.apply(whole, [0], [once])
    assert torch.equal(logits, whole)
    # Ids that are taken back are forgotten.
    del slow.ids[len(prompt) + len(new) // 2 :]
    del once.ids[len(prompt) + len(new) // 2 :]
    shorter, anew = row.clone(), row.clone()
    grown.apply(shorter, [0], [slow])
    LogitsRules(VOCAB).apply(anew, [0], [once])
    assert torch.equal(shorter, anew)


def test_tally_grows_past_its_first_room() -> None:
    r = request([5], [], frequency_penalty=1.0)
    rules = LogitsRules(1000)
    for i in range(300):
        r.ids.append(i)
        logits = torch.zeros(1, 1000)
        rules.apply(logits, [0], [r])
    assert logits[0].tolist() == [-1.0] * 300 + [0.0] * 700


@settings(max_examples=30, deadline=None)
@given(asked=st.lists(texts, min_size=2, max_size=5), seed=st.integers(0, 2**31))
def test_alone_and_in_a_batch_to_the_bit(asked: list[Any], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(asked), VOCAB, generator=generator) * 4

    def updates(rows: list[int]) -> list[tuple[Any, ...]]:
        requests = [request(prompt, new, seed=3, **p) for prompt, new, p in asked]
        choose(Sampler(VOCAB), [requests[i] for i in rows], logits[rows])
        chosen = [requests[i] for i in rows]
        return [(r.ids[-1], r.logprobs, r.top_logprobs) for r in chosen]

    together = updates(list(range(len(asked))))
    assert [updates([i])[0] for i in range(len(asked))] == together
    assert updates(list(range(len(asked)))[::-1]) == together[::-1]


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(4))
    wanted = logits[0].log_softmax(-1)
    ranking = logits[0].sort(descending=True, stable=True).indices.tolist()
    r = request([5], [], logit_bias={ranking[4]: 100.0}, logprobs=3)
    [update] = choose(Sampler(VOCAB), [r], logits.clone())
    assert update.token_ids == (ranking[4],)
    [tops] = r.top_logprobs
    assert list(tops) == [ranking[4], *ranking[:3]]
    for i, top in tops.items():
        assert top.logprob == pytest.approx(float(wanted[i]), abs=1e-6)
        assert top.rank == ranking.index(i) + 1
    assert r.logprobs == [tops[ranking[4]].logprob]


def test_asking_for_logprobs_changes_no_logprob() -> None:
    logits = torch.randn(8, VOCAB, generator=torch.Generator().manual_seed(5))
    plain = [request([5], []) for _ in range(8)]
    told = [request([5], [], logprobs=2) for _ in range(8)]
    for requests in (plain, told):
        choose(Sampler(VOCAB), requests, logits.clone())
    assert [r.logprobs for r in told] == [r.logprobs for r in plain]
    for r in told:
        [tops] = r.top_logprobs
        assert tops[r.ids[-1]].logprob == r.logprobs[0]
        assert len(tops) == 2


def test_nothing_is_done_where_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(LogitsRules, "apply", never)
    monkeypatch.setattr("qoq.engine.sampler.log_sums", never)
    logits = torch.randn(2, VOCAB)
    before = logits.clone()
    updates = choose(Sampler(VOCAB), [request([5], []), request([5], [])], logits)
    assert [u.token_ids for u in updates] == [(i,) for i in before.argmax(-1).tolist()]
    assert torch.equal(logits, before)


def test_rules_that_leave_nothing_give_way() -> None:
    rules = LogitsRules(VOCAB)
    r = request([5], [], allowed_token_ids=[EOS], min_tokens=3)
    logits = torch.zeros(1, VOCAB)
    rules.apply(logits, [0], [r])
    assert (logits[0] > -math.inf).nonzero().flatten().tolist() == [EOS]


@pytest.mark.parametrize("name", ["logit_bias", "allowed_token_ids"])
def test_ids_must_be_in_the_vocabulary(name: str) -> None:
    value = {VOCAB: 1.0} if name == "logit_bias" else [1, VOCAB]
    with pytest.raises(RequestError, match=f"{name} names token id {VOCAB}"):
        LogitsRules(VOCAB).admit(request([5], [], **{name: value}), CPU)


def test_bad_words_are_not_written(tmp_path: Any) -> None:
    size = write_byte_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    word = tokenizer.encode("abc", special=False)
    assert len(word) == 3
    r = Request([5], SamplingParams(bad_words=["abc"]), max_length=99, tokenizer=tokenizer)
    rules = LogitsRules(size, tokenizer)
    for n in range(3):
        r.ids[1:] = word[:n]
        logits = torch.zeros(1, size)
        rules.apply(logits, [0], [r])
        banned = (logits[0] == -math.inf).nonzero().flatten().tolist()
        assert banned == ([word[-1]] if n == 2 else [])
    with pytest.raises(RequestError, match="bad_words need a tokenizer"):
        LogitsRules(size).admit(r, CPU)


def test_min_tokens_hold_off_stop_strings_and_ids(tmp_path: Any) -> None:
    write_byte_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    a = tokenizer.encode("a", special=False)[0]
    params = SamplingParams(stop="a", min_tokens=3)
    r = Request([5], params, max_length=99, eos_ids=(EOS,), tokenizer=tokenizer)
    while r.finish_reason is None:
        r.accept(a, 0.0)
    assert (r.num_new, r.text, r.output().stop_reason) == (4, "aaa", "a")


@given(
    values=st.lists(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=9, max_size=9)),
    count=st.integers(1, 12),
)
def test_ranking_breaks_ties_by_id(values: list[list[float]], count: int) -> None:
    from qoq.engine.logprobs import ranks_of, top_ids

    logits = torch.tensor(values, dtype=torch.float32).reshape(-1, 9)
    got = top_ids(logits, count)
    for row, line in enumerate(values):
        wanted = sorted(range(9), key=lambda i: (-line[i], i))
        assert got[row].tolist() == wanted[:count]
        for place, i in enumerate(wanted):
            one = ranks_of(logits[row : row + 1], torch.tensor([i]))
            assert one.item() == place + 1
