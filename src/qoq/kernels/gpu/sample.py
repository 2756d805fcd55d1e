"""Triton twin of sample: the oracle's ids without sorting the vocabulary.

A row's draw is the best of all (logit / temperature + noise). If the ranking by logit lets it pass
top_k, top_p and min_p, it is the oracle's draw too, for the ids that are kept are those that rank
first; if not, the best of those that rank before it is tried, and so on. Most draws pass at once.

Nothing waits for the host, and no sum hangs on the batch. An id could differ from the oracle's
where a cumulative probability and top_p agree to 6 digits, or two candidates to 15.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qoq.kernels.gpu.backend import unsupported as unsupported_device
from qoq.kernels.sample import SampleOutput, SamplingBatch, sample_oracle

CHUNK = 8192  # ids of a program of the first kernel
LARGEST = 1 << 30  # ids, and a block more, are counted in 32 bits


def unsupported(device: torch.device, **what: Any) -> str | None:
    """See ``dispatch.Twin``."""
    logits = what.get("logits")
    if logits is not None and logits.shape[1] > LARGEST:
        return f"a vocabulary of {logits.shape[1]} ids is larger than {LARGEST}"
    return unsupported_device(device)


def sample(logits: Tensor, params: SamplingBatch) -> SampleOutput:
    """See ``qoq.kernels.sample``."""
    if not logits.numel():
        return sample_oracle(logits, params)
    logits = logits.to(torch.float32)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    (rows, vocab), device = logits.shape, logits.device

    def column(name: str, dtype: torch.dtype) -> Tensor:
        values: Tensor = getattr(params, name)
        if values.shape != (rows,):
            raise ValueError(f"need {name} [{rows}], not {list(values.shape)}")
        return values.to(dtype).contiguous()

    chunk = min(CHUNK, triton.next_power_of_2(vocab))
    chunks = triton.cdiv(vocab, chunk)

    def parts(dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, chunks, dtype=dtype, device=device)

    temperature = column("temperature", torch.float32)
    seeds, step = column("seeds", torch.int64), column("step", torch.int64)
    found = (
        *(parts(torch.float32), parts(torch.float32), parts(torch.int32)),
        *(parts(torch.float64), parts(torch.int32)),
    )
    ids = torch.empty(rows, dtype=torch.int64, device=device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=device)
    draw = (logits, logits.stride(0), temperature, seeds, step, *found)
    sizes = {"VOCAB": vocab, "CHUNK": chunk, "BLOCK": min(1024, chunk)}
    survey_kernel[rows, chunks](*draw, **sizes, num_warps=4)
    draw_kernel[rows,](
        *draw,
        column("top_k", torch.int64),
        column("top_p", torch.float32),
        column("min_p", torch.float32),
        ids,
        logprobs,
        VOCAB=vocab,
        CHUNKS=chunks,
        PARTS=triton.next_power_of_2(chunks),
        BLOCK=min(2048, chunk),
        num_warps=16,
    )
    return SampleOutput(ids, logprobs)


# Parameters lie one after the other: where depends on the rows, and must not make a kernel.
@triton.jit(do_not_specialize_on_alignment=["temperature", "seeds", "step"])
def survey_kernel(
    logits,
    stride,
    temperature,
    seeds,
    step,
    tops,  # from here on [rows, chunks]: the largest logit,
    sums,  # the sum of e^(logit - largest),
    top_ids,  # the id of the largest,
    draws,  # the best logit / temperature + noise, where the temperature is not 0,
    draw_ids,  # and its id
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of a row."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    place = row * tl.num_programs(1) + chunk
    start = logits + row.to(tl.int64) * stride
    first = chunk * CHUNK
    top = float("-inf")
    top_id = first
    for at in range(0, CHUNK, BLOCK):
        ids, x = _block(start, first + at, VOCAB, BLOCK)
        here, here_id = _first_largest(ids, x, VOCAB)
        better = (here > top) | ((here != here) & (top == top))
        top_id = tl.where(better, here_id, top_id)
        top = tl.where(better, here, top)
    total = 0.0
    for at in range(0, CHUNK, BLOCK):
        ids, x = _block(start, first + at, VOCAB, BLOCK)
        total += tl.sum(tl.where(x > float("-inf"), tl.exp(x - top), 0.0))
    tl.store(tops + place, top)
    tl.store(sums + place, total)
    tl.store(top_ids + place, top_id)
    heat = tl.load(temperature + row)
    if heat > 0:
        key = _key(tl.load(seeds + row), tl.load(step + row))
        all_of_it = float("-inf"), VOCAB
        draw, draw_id = _best_draw(start, first, CHUNK, heat, key, *all_of_it, VOCAB, BLOCK)
        tl.store(draws + place, draw)
        tl.store(draw_ids + place, draw_id)


@triton.jit(
    do_not_specialize_on_alignment=["temperature", "seeds", "step", "top_ks", "top_ps", "min_ps"]
)
def draw_kernel(
    logits,
    stride,
    temperature,
    seeds,
    step,
    tops,
    sums,
    top_ids,
    draws,
    draw_ids,
    top_ks,
    top_ps,
    min_ps,
    out_ids,
    out_logprobs,
    VOCAB: tl.constexpr,
    CHUNKS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: its largest logit, or the first draw that top_k, top_p and min_p let pass."""
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * stride
    part = tl.arange(0, PARTS)
    inside = part < CHUNKS
    places = row * CHUNKS + part
    maxima = tl.load(tops + places, mask=inside, other=float("-inf"))
    top, top_part = _first_largest(part, maxima, CHUNKS)
    chosen = tl.load(top_ids + row * CHUNKS + top_part)
    weights = tl.where(maxima > float("-inf"), tl.exp(maxima - top), 0.0)
    total = tl.sum(weights * tl.load(sums + places, mask=inside, other=0.0))
    heat = tl.load(temperature + row)
    # Logits that are no distribution (NaN, or an infinite maximum) have nothing to draw from.
    if (heat > 0) & (tl.abs(top) < float("inf")):
        values = tl.load(draws + places, mask=inside, other=float("-inf"))
        _, best_part = _first_largest(part, values, CHUNKS)
        chosen = tl.load(draw_ids + row * CHUNKS + best_part)
        top_k, top_p = tl.load(top_ks + row), tl.load(top_ps + row).to(tl.float64)
        min_p = tl.load(min_ps + row).to(tl.float64)
        top_k = tl.where((top_k > 0) & (top_k < VOCAB), top_k, VOCAB)
        if (top_k < VOCAB) | (top_p < 1) | (min_p > 0):
            key = _key(tl.load(seeds + row), tl.load(step + row))
            reach = float("inf") * top_p
            if top_p < 1:
                reach = top_p * _mass_of_top(top_k, start, top, heat, VOCAB, BLOCK)
            passed = False
            while not passed:
                logit = tl.load(start + chosen)
                before, mass = _before(logit, chosen, start, top, heat, VOCAB, BLOCK)
                enough = tl.exp(_cooled(logit, top, heat)) >= min_p
                passed = (before == 0) | ((before < top_k) & (mass < reach) & enough)
                if not passed:
                    _, chosen = _best_draw(start, 0, VOCAB, heat, key, logit, chosen, VOCAB, BLOCK)
    tl.store(out_ids + row, chosen.to(tl.int64))
    tl.store(out_logprobs + row, tl.load(start + chosen) - (top + tl.log(total)))


@triton.jit
def _block(start, first, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """(ids, logits) [BLOCK] from ``first`` on; -inf past the vocabulary."""
    ids = first + tl.arange(0, BLOCK)
    return ids, tl.load(start + ids, mask=ids < VOCAB, other=float("-inf"))


@triton.jit
def _first_largest(ids, x, none):
    """The largest of x and the lowest of its ids; NaN is larger than all."""
    spoilt = x != x
    any_spoilt = tl.max(spoilt.to(tl.int32)) > 0
    largest = tl.max(x)
    best = tl.where(any_spoilt, spoilt, x == largest)
    return tl.where(any_spoilt, float("nan"), largest), tl.min(tl.where(best, ids, none))


@triton.jit
def _ranks_before(x, ids, logit, id):
    """Where the ids of logits x stand before ``id`` in the ranking."""
    return (x > logit) | ((x == logit) & (ids < id))


@triton.jit
def _cooled(x, top, heat):
    """fp64 (x - top) / heat."""
    return (x.to(tl.float64) - top.to(tl.float64)) / heat.to(tl.float64)


@triton.jit
def _before(logit, id, start, top, heat, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """How many ids rank before ``id``, and the sum fp64 of their e^((x - top) / heat)."""
    count = 0
    mass = tl.full([], 0.0, tl.float64)
    for at in range(0, VOCAB, BLOCK):
        ids, x = _block(start, at, VOCAB, BLOCK)
        before = _ranks_before(x, ids, logit, id)
        weights = tl.exp(_cooled(x, top, heat).to(tl.float32))
        count += tl.sum(before.to(tl.int32))
        mass += tl.sum(tl.where(before, weights, 0.0).to(tl.float64))
    return count, mass


@triton.jit
def _mass_of_top(top_k, start, top, heat, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """The sum fp64 of e^((x - top) / heat) over the first top_k of the ranking."""
    last, after = tl.full([], float("-inf"), tl.float32), VOCAB
    if top_k < VOCAB:
        # The top_k-th largest logit, by bisection: low is at most its order, high above it.
        low = _order(tl.full([], float("-inf"), tl.float32))
        high = _order(top) + 1
        while high - low > 1:
            middle = low + (high - low) // 2
            count = 0
            above = high
            below = low
            for at in range(0, VOCAB, BLOCK):
                ids, x = _block(start, at, VOCAB, BLOCK)
                order = tl.where(ids < VOCAB, _order(x), low)
                reached = order >= middle
                count += tl.sum(reached.to(tl.int32))
                above = tl.minimum(above, tl.min(tl.where(reached, order, high)))
                below = tl.maximum(below, tl.max(tl.where(reached, low, order)))
            # Straight on to the nearest logit there is.
            low = tl.where(count >= top_k, above, low)
            high = tl.where(count >= top_k, high, below + 1)
        bits = tl.where(low < 0, low ^ 0x7FFFFFFF, low).to(tl.int32)
        last, after = bits.to(tl.float32, bitcast=True), 0
    before, mass = _before(last, after, start, top, heat, VOCAB, BLOCK)
    # Those that tie with the last of them all weigh the same.
    return mass + (top_k - before).to(tl.float64) * tl.exp(_cooled(last, top, heat))


@triton.jit
def _order(x):
    """int64 that orders as the fp32 numbers x do."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def _best_draw(
    start,
    first,
    SPAN: tl.constexpr,
    heat,
    key,
    logit,
    id,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The best logit / heat + noise fp64 of SPAN ids from ``first`` on, of those alone that rank
    before ``id``; and the id it belongs to."""
    best = tl.full([], float("-inf"), tl.float64)
    best_id = first
    for at in range(0, SPAN, BLOCK):
        ids, x = _block(start, first + at, VOCAB, BLOCK)
        before = _ranks_before(x, ids, logit, id)
        if tl.max(before.to(tl.int32)) > 0:
            bits = _noise_bits(key, ids)
            scaled = x.to(tl.float64) / heat.to(tl.float64)
            # fp64 logarithms are dear: -log(1 - u) is at least 1 - u, so the noise of u is at most
            # -log(1 - u), and few blocks have an id that could be the best.
            rest = (((1 << 54) - 1) - 2 * bits.to(tl.int64)).to(tl.float32) * 2.0**-54
            bound = scaled + (1e-3 - tl.log(rest)).to(tl.float64)
            if tl.max(tl.where(before, bound, float("-inf"))) > best:
                uniform = (bits.to(tl.int64).to(tl.float64) + 0.5) * 2.0**-53
                noisy = tl.where(before, scaled - tl.log(-tl.log(uniform)), float("-inf"))
                here, here_id = _first_largest(ids, noisy, VOCAB)
                best_id = tl.where(here > best, here_id, best_id)
                best = tl.where(here > best, here, best)
    return best, best_id


@triton.jit
def _key(seed, step):
    """What one draw's noise hangs on, uint64 (``gumbel`` of the oracle)."""
    seed, step = seed.to(tl.uint64, bitcast=True), step.to(tl.uint64, bitcast=True)
    return _mix(_mix(seed + 0x9E3779B97F4A7C15) ^ (step * 0xBF58476D1CE4E5B9))


@triton.jit
def _noise_bits(key, ids):
    """53 random bits of each id, uint64."""
    return _mix(key + (ids + 1).to(tl.uint64) * 0x9E3779B97F4A7C15) >> 11


@triton.jit
def _mix(z):
    """splitmix64's finalizer."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)
