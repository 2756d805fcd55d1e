"""Latency of one batch through the engine: until its first tokens, and step by step after that."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qoq.bench.serving import percentile
from qoq.bench.throughput import PAGE_SIZE
from qoq.engine.engine import Engine, pages_needed
from qoq.engine.request import SamplingParams
from qoq.formats.scheme import KVFormat
from qoq.kvcache.pool import KVPool
from qoq.models.decoder import Decoder

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Latency:
    """Seconds of several runs of one batch.

    first: to each run's first tokens, prompts read; steps: of every step after that, a token for
    each request; whole: of each run.
    """

    batch: int
    prompt_len: int
    output_len: int
    first: tuple[float, ...]
    steps: tuple[float, ...]
    whole: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Sizes, and mean, percentiles and maximum of each latency in milliseconds."""
        return {
            "batch": self.batch,
            "prompt_len": self.prompt_len,
            "output_len": self.output_len,
            "iterations": len(self.whole),
            "ttft_ms": _spread(self.first),
            "step_ms": _spread(self.steps),
            "e2el_ms": _spread(self.whole),
        }


def run(
    decoder: Decoder,
    kv: KVFormat,
    *,
    batch: int,
    prompt_len: int,
    output_len: int,
    iterations: int,
    warmups: int = 1,
    backend: str = "auto",
    seed: int = 0,
    done: Callable[[int, int], None] = lambda count, total: None,
) -> Latency:
    """Time ``iterations`` runs of ``batch`` random prompts at once, after ``warmups`` untimed ones.

    ``output_len`` is 2 or more; ``done`` is told the runs that have ended, warm-ups included, and
    the total.
    """
    config = decoder.config
    pages = batch * pages_needed(prompt_len + output_len, PAGE_SIZE)
    sizes = (config.num_layers, pages, config.num_kv_heads, PAGE_SIZE, config.head_dim)
    pool = KVPool(kv, *sizes, device=decoder.embed.device)
    # No prompt is like an earlier one, and none is to be kept.
    engine = Engine(decoder, pool, max_requests=batch, enable_prefix_caching=False, backend=backend)
    draw = random.Random(seed)
    params = SamplingParams(max_tokens=output_len, ignore_eos=True)
    first: list[float] = []
    steps: list[float] = []
    whole: list[float] = []
    for turn in range(warmups + iterations):
        requests = [
            engine.add([draw.randrange(config.vocab_size) for _ in range(prompt_len)], params)
            for _ in range(batch)
        ]
        begun = before = time.perf_counter()
        read = 0.0
        decoded = []
        while engine.unfinished:
            engine.step()
            now = time.perf_counter()
            if read:
                decoded.append(now - before)
            elif all(request.num_new for request in requests):
                read = now - begun
            before = now
        if turn >= warmups:
            first.append(read)
            steps += decoded
            whole.append(before - begun)
        done(turn + 1, warmups + iterations)
    return Latency(batch, prompt_len, output_len, tuple(first), tuple(steps), tuple(whole))


def _spread(seconds: tuple[float, ...]) -> dict[str, float]:
    values = [1e3 * value for value in seconds]
    return {
        "mean": sum(values) / len(values),
        **{f"p{p}": percentile(values, p) for p in PERCENTILES},
        "max": max(values),
    }
