"""Attention timed over KV4, KV8 and bf16 pages side by side, and in prompts beside torch's own.

What is compared is timed in turn, call by call, so that a machine that slows down slows all alike.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from qoq.bench.kernels import (
    COLD_BYTES,
    ENOUGH_SECONDS,
    MAX_RUNS,
    MIN_RUNS,
    PAGE_SIZE,
    Row,
    row_of,
)
from qoq.bench.roof import Roof, timed
from qoq.formats.kv import KVPages, page_bytes
from qoq.formats.scheme import KVFormat
from qoq.kernels.attention import attention
from qoq.kernels.cpu.backend import backend
from qoq.models.config import ModelConfig

COMPARED = (KVFormat(4, 4), KVFormat(8, 8), KVFormat(16, 16))
TORCH = "torch SDPA bf16"
"""How rows name what we are compared with."""
FLOAT_BYTES = 2  # 16-bit pages hold bf16

Run = Callable[[], object]


def decode_rows(
    config: ModelConfig,
    formats: Sequence[KVFormat],
    batches: Sequence[int],
    contexts: Sequence[int],
    roof: Roof,
) -> Iterator[Row]:
    """Attention of one layer, one new token for each of ``batch`` sequences of equal context.

    The roof is reading the pages.
    """
    for context, batch in itertools.product(contexts, batches):
        starts = torch.arange(batch + 1, dtype=torch.int32)
        q = torch.randn(batch, config.num_heads, config.head_dim)
        runs = [_over_pages(config, kv, q, starts, batch, context) for kv in formats]
        for kv, seconds in zip(formats, in_turn(runs), strict=True):
            least = roof.seconds(0, kv_bytes(config, kv, batch * context))
            yield row_of("attention", _name(config, context, kv_name(kv)), batch, seconds, least)


def prefill_rows(
    config: ModelConfig,
    formats: Sequence[KVFormat],
    chunks: Sequence[int],
    contexts: Sequence[int],
    roof: Roof,
) -> Iterator[Row]:
    """Attention of one layer, the last ``chunk`` tokens of a prompt over all of it, and torch's.

    torch gets what suits it best: dense keys and values, in bf16 already. The roof counts a
    multiplication and an addition per element of a visible key and value as int8 operations.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(backend().threads)
    try:
        for context, chunk in itertools.product(contexts, chunks):
            if chunk > context:
                continue
            q = torch.randn(chunk, config.num_heads, config.head_dim)
            starts = torch.tensor([0, chunk], dtype=torch.int32)
            runs = [_over_pages(config, kv, q, starts, 1, context) for kv in formats]
            runs.append(_torch_prefill(config, chunk, context))
            seen = chunk * (context - chunk) + chunk * (chunk + 1) // 2
            ops = 4 * config.num_heads * config.head_dim * seen
            for kv, seconds in zip([*formats, None], in_turn(runs), strict=True):
                size = kv_bytes(config, kv or COMPARED[-1], context)
                name = _name(config, context, kv_name(kv) if kv else TORCH)
                least = roof.seconds(ops, size)
                yield row_of("attention_prefill", name, chunk, seconds, least)
    finally:
        torch.set_num_threads(before)


def prefill_cases(chunks: Sequence[int], contexts: Sequence[int]) -> int:
    """How many (chunk, context) pairs ``prefill_rows`` measures."""
    return sum(chunk <= context for chunk, context in itertools.product(chunks, contexts))


def in_turn(runs: Sequence[Run]) -> list[float]:
    """Median seconds of each run, all timed in turn after one round that does not count."""
    slowest = max(timed(run, 1)[0] for run in runs)
    repeats = int(min(MAX_RUNS, max(MIN_RUNS, ENOUGH_SECONDS / max(slowest, 1e-6))))
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, times in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def kv_name(kv: KVFormat) -> str:
    """kv4, k8v4, ...; bf16 for pages of floats."""
    return "bf16" if kv.k_bits == kv.v_bits == 16 else str(kv)


def random_pages(
    kv: KVFormat, num: int, kv_heads: int, dim: int, device: torch.device | str = "cpu"
) -> KVPages:
    """Pages of PAGE_SIZE tokens with codes as a model might write them, or bf16 numbers.

    All alike, but each in memory of its own.
    """
    dtype = torch.bfloat16
    pages = KVPages.empty(kv, num, kv_heads, PAGE_SIZE, dim, device=device, dtype=dtype)
    for codes in (pages.k_codes, pages.v_codes):
        # One page many times: drawing them all would take longer than the bench, and so would
        # bringing more than one to a GPU.
        floats = codes.dtype is torch.bfloat16
        page = codes.shape[1:]
        drawn = torch.randn(page) if floats else torch.randint(0, 256, page)
        codes.copy_(drawn.to(codes.device))
    for scale, offset in ((pages.k_scale, pages.k_offset), (pages.v_scale, pages.v_offset)):
        scale.fill_(0.1)
        offset.fill_(-0.75)
    return pages


def _over_pages(
    config: ModelConfig, kv: KVFormat, q: Tensor, starts: Tensor, batch: int, context: int
) -> Run:
    """A call of attention over pages that no cache holds: each call takes another layer's."""
    each = -(-context // PAGE_SIZE)
    copies = int(-(-COLD_BYTES // kv_bytes(config, kv, batch * context)))
    shape = (batch * each, config.num_kv_heads, config.head_dim)
    layers = itertools.cycle([random_pages(kv, *shape) for _ in range(copies)])
    table = torch.randperm(batch * each, dtype=torch.int32).reshape(batch, each)
    lens = torch.full((batch,), context, dtype=torch.int32)
    return lambda: attention(q, next(layers), table, lens, starts, config.sm_scale)


def _torch_prefill(config: ModelConfig, chunk: int, context: int) -> Run:
    """torch's scaled_dot_product_attention in the quickest of its ways to share KV heads."""
    q = torch.randn(1, config.num_heads, chunk, config.head_dim).bfloat16()
    k, v = torch.randn(2, 1, config.num_kv_heads, context, config.head_dim).bfloat16()
    group = config.num_heads // config.num_kv_heads
    wide = [x.repeat_interleave(group, dim=1) for x in (k, v)]
    # Its own causal mask begins at the first key, so a later chunk needs one that is written out.
    masked = {"is_causal": True}
    if chunk < context:
        own = torch.arange(context - chunk, context)[:, None]
        masked = {"attn_mask": torch.arange(context) <= own}  # type: ignore[dict-item]
    more = {"scale": config.sm_scale, **masked}
    ways: list[Run] = [
        lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **more),  # type: ignore[arg-type]
        lambda: F.scaled_dot_product_attention(q, *wide, **more),  # type: ignore[arg-type]
    ]
    return min(ways, key=lambda way: min(timed(way, 2)))


def kv_bytes(config: ModelConfig, kv: KVFormat, tokens: int) -> float:
    """Bytes of one layer's keys and values of so many tokens."""
    shape = (config.num_kv_heads, PAGE_SIZE, config.head_dim)
    return tokens * page_bytes(kv, *shape, float_bytes=FLOAT_BYTES) / PAGE_SIZE


def _name(config: ModelConfig, context: int, kind: str) -> str:
    heads = f"{config.num_heads}/{config.num_kv_heads} heads of {config.head_dim}"
    return f"{heads}, context {context}, {kind}"
