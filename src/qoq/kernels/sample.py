"""sample: logits to ids, greedy or by Gumbel-max with randomness that belongs to the request.

The noise of a token is a hash of (request seed, step, vocabulary id), never a stream shared by a
batch: a request draws the same ids whatever runs beside it (design decision 3).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qoq.kernels.dispatch import resolve

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # splitmix64's increment and multipliers, as int64
_MIX1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX2 = 0x94D049BB133111EB - (1 << 64)


@dataclass(frozen=True)
class SamplingBatch:
    """Sampling parameters of S sequences, one tensor [S] each.

    temperature fp32 (0 = greedy); top_k int (0 = off); top_p fp32 in (0, 1] (1 = off); min_p fp32
    in [0, 1] (0 = off); seeds int64; step int64 = index of the token drawn, so that no two tokens
    of a request share their noise.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    step: Tensor


@dataclass(frozen=True)
class SampleOutput:
    """ids int64 [S] and logprobs fp32 [S]: log_softmax of the raw logits at each id."""

    ids: Tensor
    logprobs: Tensor


def sample(logits: Tensor, params: SamplingBatch) -> SampleOutput:
    """Choose one id per row of logits fp32 [S, V].

    Rows of temperature 0 take the highest logit (the lowest id of a tie). Other rows divide by the
    temperature, keep the top_k highest, then the fewest whose probability reaches top_p, then those
    of at least min_p times the highest; ties rank by id. At least one id is always kept.
    """
    run = resolve("sample", "auto", logits.device, logits=logits)
    out: SampleOutput = run(logits, params)
    return out


def sample_oracle(logits: Tensor, params: SamplingBatch) -> SampleOutput:
    """Torch truth of ``sample``."""
    logits = logits.to(torch.float32)
    ids = logits.argmax(dim=-1)
    random = (params.temperature > 0).nonzero().squeeze(-1)
    if random.numel():
        ids[random] = _draw(logits[random], params, random)
    chosen = logits.gather(-1, ids[:, None]).squeeze(-1)
    return SampleOutput(ids, chosen - logits.logsumexp(dim=-1))


def _draw(logits: Tensor, params: SamplingBatch, rows: Tensor) -> Tensor:
    """ids int64 [R] of the non-greedy rows; logits [R, V] are theirs, ``rows`` [R] their places."""
    # fp64 throughout: a cold temperature must not overflow, a long cumulative sum not drift.
    scaled = logits.to(torch.float64) / params.temperature[rows].to(torch.float64)[:, None]
    ranked, order = scaled.sort(dim=-1, descending=True, stable=True)
    vocab = logits.shape[-1]
    top_k = params.top_k[rows][:, None]
    rank = torch.arange(vocab, device=logits.device)
    ranked = ranked.masked_fill((rank >= top_k) & (top_k > 0), -torch.inf)
    probs = ranked.softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs
    keep = before < params.top_p[rows].to(torch.float64)[:, None]
    keep &= probs >= params.min_p[rows].to(torch.float64)[:, None] * probs[:, :1]
    keep[:, 0] = True
    noisy = ranked + gumbel(params.seeds[rows], params.step[rows], vocab).gather(-1, order)
    best = noisy.masked_fill(~keep, -torch.inf).argmax(dim=-1, keepdim=True)
    return order.gather(-1, best).squeeze(-1)


def gumbel(seeds: Tensor, step: Tensor, vocab: int) -> Tensor:
    """Gumbel(0, 1) noise fp64 [R, vocab], a pure function of (seed, step, id) by splitmix64."""
    key = _mix(_mix(seeds.to(torch.int64) + _GOLDEN) ^ (step.to(torch.int64) * _MIX1))
    ids = torch.arange(1, vocab + 1, device=seeds.device) * _GOLDEN
    bits = _shift(_mix(key[:, None] + ids), 11)
    uniform = (bits.to(torch.float64) + 0.5) * 2.0**-53
    return -(-uniform.log()).log()


def _mix(z: Tensor) -> Tensor:
    """splitmix64's finalizer on int64 (products wrap)."""
    z = (z ^ _shift(z, 30)) * _MIX1
    z = (z ^ _shift(z, 27)) * _MIX2
    return z ^ _shift(z, 31)


def _shift(z: Tensor, n: int) -> Tensor:
    """Logical right shift: torch's own drags the sign bit along."""
    return (z >> n) & ((1 << (64 - n)) - 1)
