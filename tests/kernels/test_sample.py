"""sample: the right sets, the right frequencies, and rows that do not know their batch."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qoq.kernels.sample import SamplingBatch, gumbel, sample


def params(rows: int, **columns: float | Tensor) -> SamplingBatch:
    """Defaults: temperature 1, everything else off, seed 0, steps 0, 1, 2, ..."""
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seeds": 0}
    batch = {"step": torch.arange(rows)}
    for name, default in (values | columns).items():
        dtype = torch.float32 if name in ("temperature", "top_p", "min_p") else torch.int64
        column = torch.as_tensor(columns.get(name, default), dtype=dtype)
        batch[name] = column.expand(rows).clone()
    return SamplingBatch(**batch)


def take(batch: SamplingBatch, rows: Tensor) -> SamplingBatch:
    return SamplingBatch(**{f.name: getattr(batch, f.name)[rows] for f in fields(batch)})


def allowed(logits: list[float], temperature: float, k: int, p: float, min_p: float) -> set[int]:
    """The ids a row may draw, step by step in Python floats."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    order = order[:k] if k else order
    weights = torch.tensor([logits[i] / temperature for i in order], dtype=torch.float64)
    probs = weights.softmax(0).tolist()
    kept, mass = set(), 0.0
    for i, prob in zip(order, probs, strict=True):
        if (mass < p and prob >= min_p * probs[0]) or not kept:
            kept.add(i)
        mass += prob
    return kept


def test_greedy_takes_the_lowest_of_a_tie() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 5.0, 5.0, 5.0], [-9.0, -8.0, -7.0, -7.0]])
    batch = params(3, temperature=0.0, top_k=1, top_p=0.1, min_p=1.0)
    out = sample(logits, batch)
    assert out.ids.tolist() == [1, 0, 2]
    assert out.ids.dtype == torch.int64
    assert out.logprobs.dtype == torch.float32


def test_greedy_equals_argmax_on_wide_rows() -> None:
    logits = torch.randn(7, 5003)
    assert torch.equal(sample(logits, params(7, temperature=0.0)).ids, logits.argmax(1))


@pytest.mark.parametrize("temperature", [0.0, 0.3, 2.0])
def test_logprobs_are_those_of_the_raw_logits(temperature: float) -> None:
    logits = torch.randn(20, 101) * 5
    out = sample(logits, params(20, temperature=temperature, top_k=4, top_p=0.7))
    want = logits.double().log_softmax(1).gather(1, out.ids[:, None])[:, 0]
    torch.testing.assert_close(out.logprobs.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_frequencies_follow_the_softmax(temperature: float) -> None:
    rows, vocab = 20_000, 6
    logits = torch.tensor([1.0, -0.5, 2.0, 0.0, -3.0, 1.5])
    seed = int(torch.randint(0, 1 << 40, ()))
    out = sample(logits.expand(rows, vocab), params(rows, temperature=temperature, seeds=seed))
    want = (logits.double() / temperature).softmax(0) * rows
    counts = torch.bincount(out.ids, minlength=vocab).double()
    chi_square = ((counts - want) ** 2 / want).sum()
    assert chi_square < 35  # 5 degrees of freedom: about once in a million


def test_frequencies_over_seeds_instead_of_steps() -> None:
    rows = 20_000
    batch = replace(params(rows), seeds=torch.arange(rows), step=torch.full((rows,), 3))
    ids = sample(torch.zeros(rows, 4), batch).ids
    assert (torch.bincount(ids, minlength=4) - rows / 4).abs().max() < 5 * (rows * 3 / 16) ** 0.5


@given(
    logits=st.lists(st.integers(-40, 40), min_size=1, max_size=12, unique=True),
    temperature=st.sampled_from([0.25, 1.0, 4.0]),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([1e-9, 0.3, 0.77, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.6, 1.0]),
)
def test_only_allowed_ids_are_drawn(
    logits: list[int], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    values = [x / 8 for x in logits]
    batch = params(200, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    # The columns are fp32, so the reference must use those numbers too.
    p, low = batch.top_p[0].item(), batch.min_p[0].item()
    want = allowed(values, temperature, top_k, p, low)
    drawn = set(sample(torch.tensor(values).expand(200, -1), batch).ids.tolist())
    assert drawn <= want
    if len(want) == 1:
        assert drawn == want


def test_every_allowed_id_is_drawn() -> None:
    logits = torch.tensor([0.4, 0.0, 0.3, -0.2, 0.1]).expand(2000, 5)
    for columns in ({"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.7}):
        assert set(sample(logits, params(2000, **columns)).ids.tolist()) == {0, 2, 4}


def test_top_k_of_a_tie_keeps_exactly_k() -> None:
    for vocab in (9, 3001):
        drawn = sample(torch.zeros(100, vocab), params(100, top_k=2)).ids
        assert set(drawn.tolist()) == {0, 1}


def test_top_p_stops_as_soon_as_it_is_reached() -> None:
    drawn = sample(torch.zeros(100, 4), params(100, top_p=0.5)).ids
    assert set(drawn.tolist()) == {0, 1}


def test_masked_ids_are_never_drawn() -> None:
    logits = torch.zeros(500, 6)
    logits[:, [0, 3]] = -torch.inf
    out = sample(logits, params(500, temperature=5.0))
    assert set(out.ids.tolist()) == {1, 2, 4, 5}
    assert out.logprobs.isfinite().all()


def test_a_row_does_not_know_its_batch() -> None:
    rows = 40
    logits = torch.randn(rows, 257) * 2
    batch = SamplingBatch(
        torch.rand(rows) * (torch.rand(rows) > 0.3),
        torch.randint(0, 30, (rows,)),
        torch.rand(rows) * 0.9 + 0.1,
        torch.rand(rows) * 0.1,
        torch.randint(-(1 << 62), 1 << 62, (rows,)),
        torch.randint(0, 1000, (rows,)),
    )
    whole = sample(logits, batch)
    for chosen in (torch.tensor([0]), torch.tensor([17]), torch.randperm(rows)[:13]):
        part = sample(logits[chosen], take(batch, chosen))
        assert torch.equal(part.ids, whole.ids[chosen])
        assert torch.equal(part.logprobs, whole.logprobs[chosen])


def test_seed_and_step_both_matter_and_repeat() -> None:
    logits = torch.zeros(64, 1000)
    base = params(64, seeds=7)
    first = sample(logits, base).ids
    assert torch.equal(first, sample(logits, base).ids)
    assert len(set(first.tolist())) > 50
    assert (first != sample(logits, params(64, seeds=8)).ids).sum() > 50
    later = replace(base, step=base.step + 64)
    assert (first != sample(logits, later).ids).sum() > 50


def test_cold_temperatures_become_greedy_without_overflow() -> None:
    logits = torch.randn(50, 300) * 10
    out = sample(logits, params(50, temperature=1e-30))
    assert torch.equal(out.ids, logits.argmax(1))


def test_gumbel_is_splitmix64_to_the_bit() -> None:
    mask = (1 << 64) - 1

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    seeds, steps = [0, 1, -1, (1 << 63) - 1], [0, 5, 1000, 2]
    uniforms = []
    for seed, step in zip(seeds, steps, strict=True):
        key = mix(mix((seed + golden) & mask) ^ (step * 0xBF58476D1CE4E5B9 & mask))
        uniforms.append(
            [((mix((key + i * golden) & mask) >> 11) + 0.5) / 2**53 for i in range(1, 8)]
        )
    want = -(-torch.tensor(uniforms, dtype=torch.float64).log()).log()
    got = gumbel(torch.tensor(seeds), torch.tensor(steps), 7)
    torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)


def test_no_rows_and_one_id() -> None:
    assert sample(torch.empty(0, 5), params(0)).ids.shape == (0,)
    out = sample(torch.randn(3, 1), params(3))
    assert out.ids.tolist() == [0, 0, 0]
    assert out.logprobs.tolist() == [0, 0, 0]


def test_inputs_are_left_alone() -> None:
    logits = torch.randn(4, 9)
    before = logits.clone()
    sample(logits, params(4, temperature=torch.tensor([0.0, 1.0, 0.0, 0.5])))
    assert torch.equal(logits, before)
