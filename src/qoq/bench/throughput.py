"""Tokens per second of a whole model, through the engine, with prompts of equal length.

QServe's protocol (section 6.1): 1024 tokens in, 512 out, the batch grown until throughput peaks or
memory ends ("maximum achievable throughput").
"""

import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch

from qoq.engine.engine import Engine, pages_needed
from qoq.engine.request import Request, SamplingParams
from qoq.formats.scheme import KVFormat
from qoq.kvcache.pool import KVPool
from qoq.models.decoder import Decoder

PAGE_SIZE = 64
FALLS = 2  # batch sizes without a new best after which growing stops


@dataclass(frozen=True)
class Throughput:
    """One run. prefill_tok_s: prompt tokens over the time until every prompt is read;
    decode_tok_s: tokens generated after that over the rest; output_tok_s and total_tok_s: generated
    tokens, and those with the prompts', over the whole time.
    """

    batch: int
    prompt_len: int
    output_len: int
    seconds: float
    prefill_tok_s: float
    decode_tok_s: float
    output_tok_s: float
    total_tok_s: float
    kv_cache_bytes: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def run(
    decoder: Decoder,
    kv: KVFormat,
    *,
    batch: int,
    prompt_len: int,
    output_len: int,
    backend: str = "auto",
    enforce_eager: bool = False,
    warm_up: bool = False,
    seed: int = 0,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> Throughput:
    """Generate ``output_len`` tokens (2 or more) for ``batch`` random prompts at once, where the
    decoder's weights are. A 16-bit cache holds bf16.

    ``warm_up``: do so once before what counts, as GPUs want it, which compile kernels and record
    graphs as they meet them. ``step`` is told the tokens generated so far and the total.
    """
    config = decoder.config
    pages = batch * pages_needed(prompt_len + output_len, PAGE_SIZE)
    pool = KVPool(
        kv,
        config.num_layers,
        pages,
        config.num_kv_heads,
        PAGE_SIZE,
        config.head_dim,
        device=decoder.embed.device,
        dtype=torch.bfloat16,
    )
    engine = Engine(decoder, pool, max_requests=batch, enforce_eager=enforce_eager, backend=backend)
    draw = random.Random(seed)
    params = SamplingParams(max_tokens=output_len, ignore_eos=True)

    def ask() -> list[Request]:
        return [
            engine.add([draw.randrange(config.vocab_size) for _ in range(prompt_len)], params)
            for _ in range(batch)
        ]

    if warm_up:
        ask()
        while engine.unfinished:
            engine.step()
    requests = ask()
    start = time.perf_counter()
    read = 0.0
    early = 0  # tokens generated while prompts were still being read
    while engine.unfinished:
        engine.step()
        made = sum(request.num_new for request in requests)
        if not read and all(request.num_new for request in requests):
            read, early = time.perf_counter() - start, made
        step(made, batch * output_len)
    seconds = time.perf_counter() - start
    tokens = batch * output_len
    return Throughput(
        batch,
        prompt_len,
        output_len,
        seconds,
        batch * prompt_len / read,
        (tokens - early) / (seconds - read) if seconds > read else 0.0,
        tokens / seconds,
        tokens * (1 + prompt_len / output_len) / seconds,
        pool.nbytes,
    )


def grow(measure: Callable[[int], Throughput], most: int) -> Iterator[Throughput]:
    """Measure batches 1, 2, 4, ... up to ``most``, until more requests bring no more output."""
    best, falls, batch = 0.0, 0, 1
    while batch <= most and falls < FALLS:
        result = measure(batch)
        yield result
        falls = 0 if result.output_tok_s > best else falls + 1
        best = max(best, result.output_tok_s)
        batch *= 2


def peak_rss_bytes() -> int:
    """The most memory this process has held so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
