"""C++ sample against its oracle: the same ids."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers.sampling_params import random_params
from qoq.kernels.cpu.sample import sample, unsupported
from qoq.kernels.sample import SamplingBatch, sample_oracle

pytestmark = pytest.mark.usefixtures("variant")


def compare(logits: Tensor, params: SamplingBatch) -> None:
    before = logits.clone()
    got, want = sample(logits, params), sample_oracle(logits, params)
    assert got.ids.dtype == torch.int64
    assert got.logprobs.dtype == torch.float32
    assert torch.equal(got.ids, want.ids)
    torch.testing.assert_close(got.logprobs, want.logprobs, rtol=1e-6, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True)


@given(
    rows=st.integers(1, 12),
    vocab=st.one_of(st.integers(1, 70), st.sampled_from([511, 512, 513, 2048, 5003])),
    spread=st.sampled_from([0.01, 1.0, 4.0, 30.0]),
    ties=st.booleans(),
    masked=st.booleans(),
)
def test_ids_are_the_oracles(
    rows: int, vocab: int, spread: float, ties: bool, masked: bool
) -> None:
    logits = torch.randn(rows, vocab) * spread
    if ties:
        logits = (logits * 2).round() / 2  # -0 and 0 among them
    if masked:
        logits[torch.rand(rows, vocab) < 0.5] = -torch.inf
        logits[:, 0] = 1.0
    compare(logits, random_params(rows))


@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0])
def test_a_large_vocabulary(spread: float) -> None:
    logits = torch.randn(16, 32_003) * spread
    params = random_params(16)
    # top_p near 1 with nothing else to narrow it: the search for its end must widen.
    params.top_p[0], params.top_k[0], params.min_p[0], params.temperature[0] = 0.999, 0, 0.0, 1.5
    params.top_k[1], params.temperature[1] = 30_000, 1.0
    compare(logits, params)


def test_draws_without_filters_on_many_rows() -> None:
    # The same id wins whatever was passed over without computing its noise.
    logits = torch.randn(400, 3001) * torch.rand(400, 1) * 6
    compare(logits, random_params(400, filters=False))


@given(
    vocab=st.integers(1, 40),
    top_k=st.integers(0, 45),
    top_p=st.sampled_from([1e-9, 0.1, 0.25, 0.3, 0.5, 0.7, 0.75, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_equal_logits_stop_where_the_oracle_stops(
    vocab: int, top_k: int, top_p: float, min_p: float
) -> None:
    rows = 60
    batch = SamplingBatch(
        torch.ones(rows),
        torch.full((rows,), top_k),
        torch.full((rows,), top_p),
        torch.full((rows,), min_p),
        torch.randint(0, 1 << 40, (rows,)),
        torch.arange(rows),
    )
    compare(torch.zeros(rows, vocab), batch)


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-3, 1e4, 3e38])
def test_extreme_temperatures(temperature: float) -> None:
    logits = torch.randn(40, 300) * 10
    params = random_params(40)
    compare(logits, replace(params, temperature=torch.full((40,), temperature)))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("vocab", [1, 600])
def test_rows_that_are_no_distribution(bad: float, vocab: int) -> None:
    logits = torch.randn(30, vocab)
    for row in range(0, 30, 2):
        logits[row, torch.randint(0, vocab, (1 + row % 3,))] = bad
    logits[::3] = -torch.inf
    compare(logits, random_params(30))


def test_logits_may_be_views_or_halves() -> None:
    wide = torch.randn(9, 150)
    params = random_params(9)
    for logits in (
        wide[:, 3:103],
        wide[0].expand(9, 150),
        wide.t().contiguous().t(),
        wide.half(),
        wide.double(),
    ):
        compare(logits, params)
    strided = {f.name: getattr(params, f.name).repeat_interleave(2)[::2] for f in fields(params)}
    compare(wide, SamplingBatch(**strided))
    compare(wide, replace(params, top_k=params.top_k.int(), step=params.step.int()))


def test_a_row_does_not_know_its_batch() -> None:
    logits, params = torch.randn(40, 777) * 2, random_params(40)
    whole = sample(logits, params)
    for chosen in (torch.tensor([0]), torch.tensor([17]), torch.randperm(40)[:13]):
        part = SamplingBatch(**{f.name: getattr(params, f.name)[chosen] for f in fields(params)})
        out = sample(logits[chosen], part)
        assert torch.equal(out.ids, whole.ids[chosen])
        assert torch.equal(out.logprobs, whole.logprobs[chosen])


def test_no_rows_and_refusals() -> None:
    out = sample(torch.empty(0, 5), random_params(0))
    assert out.ids.shape == out.logprobs.shape == (0,)
    with pytest.raises(ValueError, match=r"\[3\]"):
        sample(torch.randn(3, 5), random_params(2))
    assert unsupported(torch.device("cpu")) is None
    assert "CPU" in str(unsupported(torch.device("cuda")))
