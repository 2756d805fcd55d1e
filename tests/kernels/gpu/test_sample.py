"""Triton sample against its oracle: the same ids."""

from dataclasses import fields, replace

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.sampling_params import random_params
from helpers.triton_code import ARCHS, Compiler, Kernel
from qoq.kernels.gpu.sample import CHUNK, LARGEST, _mass_of_top, sample, unsupported
from qoq.kernels.sample import SamplingBatch, sample_oracle

FEW = settings(max_examples=12)

pytestmark = pytest.mark.usefixtures("faithful")


def cpu(params: SamplingBatch) -> SamplingBatch:
    return SamplingBatch(**{f.name: getattr(params, f.name).cpu() for f in fields(params)})


def compare(logits: Tensor, params: SamplingBatch, *, atol: float = 1e-5) -> None:
    before = logits.clone()
    got, want = sample(logits, params), sample_oracle(logits.cpu(), cpu(params))
    assert got.ids.dtype == torch.int64
    assert got.logprobs.dtype == torch.float32
    assert torch.equal(got.ids.cpu(), want.ids)
    same = {"rtol": 1e-6, "atol": atol, "equal_nan": True}
    torch.testing.assert_close(got.logprobs.cpu(), want.logprobs, **same)
    torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True)


# A vocabulary is a constant of the kernels: few of them, so that a GPU compiles few.
@FEW
@given(
    rows=st.integers(1, 7),
    vocab=st.sampled_from([1, 2, 61, 512, 2049]),
    spread=st.sampled_from([0.01, 1.0, 4.0, 30.0]),
    ties=st.booleans(),
    masked=st.booleans(),
)
def test_ids_are_the_oracles(
    device: torch.device, rows: int, vocab: int, spread: float, ties: bool, masked: bool
) -> None:
    logits = torch.randn(rows, vocab) * spread
    if ties:
        logits = (logits * 2).round() / 2  # -0 and 0 among them
    if masked:
        logits[torch.rand(rows, vocab) < 0.5] = -torch.inf
        logits[:, 0] = 1.0
    compare(logits.to(device), random_params(rows, device=device))


@triton.jit
def mass_kernel(logits, tops, top_ks, out, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    args = logits + row * VOCAB, tl.load(tops + row), tl.full([], 2.0, tl.float32)
    tl.store(out + row, _mass_of_top(tl.load(top_ks + row), *args, VOCAB, BLOCK))


@pytest.mark.parametrize("ties", [False, True])
def test_the_mass_of_the_first_ranks(device: torch.device, ties: bool) -> None:
    vocab, rows = 300, 25
    logits = torch.randn(rows, vocab, device=device) * 3
    if ties:
        logits = logits.round()
    top_ks = torch.randint(1, vocab, (rows,), device=device)
    top_ks[:3] = torch.tensor([1, 2, vocab])
    out = torch.empty(rows, dtype=torch.float64, device=device)
    tops = logits.amax(1)
    mass_kernel[rows,](logits, tops, top_ks, out, VOCAB=vocab, BLOCK=128)
    ranked = logits.double().sort(dim=1, descending=True).values
    weights = ((ranked - ranked[:, :1]) / 2).exp()
    want = [weights[row, :k].sum() for row, k in enumerate(top_ks.tolist())]
    torch.testing.assert_close(out, torch.stack(want), rtol=1e-6, atol=0)


def test_a_large_vocabulary(device: torch.device) -> None:
    vocab = 2 * CHUNK + 77
    logits = torch.randn(4, vocab, device=device) * torch.tensor([[0.3], [3.0]] * 2, device=device)
    params = random_params(4, device=device)
    # top_p near 1 with nothing else to narrow it, many kept by rank, and both.
    params.top_p[0], params.top_k[0], params.min_p[0], params.temperature[0] = 0.999, 0, 0.0, 1.5
    params.top_p[1], params.top_k[1], params.temperature[1] = 1.0, vocab - 900, 1.0
    params.top_p[2], params.top_k[2], params.temperature[2] = 0.3, 10_000, 2.0
    params.temperature[3] = 0.0
    compare(logits, params)


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(1, 1.0), (2, 1.0), (17, 1e-9), (3, 0.31), (45, 0.13), (17, 0.77)]
)
def test_equal_logits_stop_where_the_oracle_stops(
    device: torch.device, top_k: int, top_p: float
) -> None:
    # No multiple of 1/k: there the two could round to different sides.
    rows = 6
    whole = torch.full((rows,), top_k)
    params = SamplingBatch(
        torch.ones(rows),
        whole,
        torch.full((rows,), top_p if top_p in (1e-9, 1.0) else top_p + 1.37e-3),
        torch.zeros(rows),
        torch.randint(0, 1 << 40, (rows,)),
        torch.arange(rows),
    )
    moved = SamplingBatch(**{f.name: getattr(params, f.name).to(device) for f in fields(params)})
    compare(torch.zeros(rows, 40, device=device), moved)


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-3, 1e4, 3e38])
def test_extreme_temperatures(device: torch.device, temperature: float) -> None:
    logits = torch.randn(5, 300, device=device) * 10
    logits[0, 7] = logits[0].max()
    params = random_params(5, device=device)
    heat = torch.full((5,), temperature, device=device)
    compare(logits, replace(params, temperature=heat), atol=2e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("vocab", [1, 600])
def test_rows_that_are_no_distribution(device: torch.device, bad: float, vocab: int) -> None:
    logits = torch.randn(8, vocab)
    for row in range(0, 8, 2):
        logits[row, torch.randint(0, vocab, (1 + row % 3,))] = bad
    logits[::3] = -torch.inf
    compare(logits.to(device), random_params(8, device=device))


def test_nan_in_a_later_chunk_is_the_greedy_choice(device: torch.device) -> None:
    logits = torch.randn(1, CHUNK + 9)
    logits[0, CHUNK + 3 :: 2] = torch.nan
    compare(logits.to(device), random_params(1, device=device))


def test_logits_may_be_views_or_halves(device: torch.device) -> None:
    wide = torch.randn(3, 150, device=device)
    params = random_params(3, device=device)
    some = wide[:, 3:103]
    views = (some, wide[0, :100].expand(3, 100), some.t().contiguous().t())
    for logits in (*views, some.half(), some.double()):
        compare(logits, params)
    strided = {f.name: getattr(params, f.name).repeat_interleave(2)[::2] for f in fields(params)}
    compare(some, SamplingBatch(**strided))
    compare(some, replace(params, top_k=params.top_k.int(), step=params.step.int()))


def test_a_row_does_not_know_its_batch(device: torch.device) -> None:
    logits, params = torch.randn(9, 777, device=device) * 2, random_params(9, device=device)
    whole = sample(logits, params)
    for chosen in (torch.tensor([0]), torch.tensor([7]), torch.randperm(9)[:4]):
        at = chosen.to(device)
        part = SamplingBatch(**{f.name: getattr(params, f.name)[at] for f in fields(params)})
        out = sample(logits[at], part)
        assert torch.equal(out.ids, whole.ids[at])
        assert torch.equal(out.logprobs, whole.logprobs[at])


def test_no_rows_and_refusals(device: torch.device) -> None:
    out = sample(torch.empty(0, 5, device=device), random_params(0, device=device))
    assert out.ids.shape == out.logprobs.shape == (0,)
    with pytest.raises(ValueError, match=r"\[3\]"):
        sample(torch.randn(3, 5, device=device), random_params(2, device=device))
    huge = torch.empty(1, LARGEST + 1, device="meta")
    assert "larger" in str(unsupported(torch.device("cuda"), logits=huge))
    assert "CUDA" in str(unsupported(torch.device("cpu")))


def test_machine_code(compiler: Compiler) -> None:
    """No spills at a vocabulary of today's size."""
    vocab, chunks = 128256, -(-128256 // CHUNK)
    row = {"logits": "*fp32", "stride": "i32", "temperature": "*fp32", "seeds": "*i64"}
    found = {"tops": "*fp32", "sums": "*fp32", "top_ids": "*i32", "draws": "*fp64"}
    both = {**row, "step": "*i64", **found, "draw_ids": "*i32"}
    filters = {"top_ks": "*i64", "top_ps": "*fp32", "min_ps": "*fp32"}
    kernels = [
        Kernel(
            "qoq.kernels.gpu.sample:survey_kernel",
            both,
            {"VOCAB": vocab, "CHUNK": CHUNK, "BLOCK": 1024},
            {"num_warps": 4},
        ),
        Kernel(
            "qoq.kernels.gpu.sample:draw_kernel",
            {**both, **filters, "out_ids": "*i64", "out_logprobs": "*fp32"},
            {"VOCAB": vocab, "CHUNKS": chunks, "PARTS": 16, "BLOCK": 2048},
            {"num_warps": 16},
        ),
    ]
    assert chunks == 16
    for kernel, codes in zip(kernels, compiler(kernels), strict=True):
        for arch, code in zip(ARCHS, codes, strict=True):
            assert code.spills == 0, f"{kernel.function} on {arch}"
