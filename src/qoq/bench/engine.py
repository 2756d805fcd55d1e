"""Step overhead: all that a step does but the kernels, measured with a model that does nothing."""

import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from qoq.bench.shapes import config_of
from qoq.engine.engine import Engine
from qoq.engine.request import SamplingParams
from qoq.formats.kv import KVPages
from qoq.formats.scheme import KVFormat
from qoq.kvcache.pool import KVPool, pages_for_tokens
from qoq.models.batch import Batch
from qoq.models.decoder import Decoder
from qoq.tokenizer import Tokenizer

PAGE_SIZE = 64
PROMPT = 100
WARM_UP = 20


@dataclass(frozen=True)
class StepTime:
    """Milliseconds of a step with ``running`` requests that generate and ``waiting`` in line."""

    running: int
    waiting: int
    median_ms: float
    p99_ms: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class NullModel:
    """Answers with logits that it has ready. The sampler runs, over a vocabulary this small."""

    def __init__(self, vocab_size: int, most_rows: int) -> None:
        tiny = replace(config_of("llama-3.2-1b", 1), vocab_size=vocab_size)
        self.config = replace(tiny, num_heads=1, num_kv_heads=1, head_dim=2)
        self._logits = torch.randn(most_rows, vocab_size)

    def __call__(
        self,
        batch: Batch,
        kv: Sequence[KVPages],
        rows: Tensor | None = None,
        *,
        backend: str = "auto",
    ) -> Tensor:
        return self._logits[: batch.num_tokens if rows is None else rows.shape[0]]


def step_time(
    running: int, waiting: int, *, steps: int = 300, tokenizer: Tokenizer | None = None
) -> StepTime:
    """Time ``steps`` steps; with a tokenizer every new token is made text, as in a server."""
    vocab = 256 if tokenizer is None else len(tokenizer)
    model = NullModel(vocab, running)
    length = PROMPT + WARM_UP + 2 * steps
    pool = KVPool(KVFormat(4, 4), 1, running * pages_for_tokens(length, PAGE_SIZE), 1, PAGE_SIZE, 2)
    engine = Engine(
        cast(Decoder, model), pool, tokenizer=tokenizer, max_requests=running, max_step_tokens=2048
    )
    params = SamplingParams(max_tokens=length - PROMPT, ignore_eos=True)
    for i in range(running + waiting):
        engine.add([i % vocab, *range(PROMPT - 1)], params)
    while engine.stats().generation_tokens < WARM_UP * running:
        engine.step()
    gc.collect()
    gc.freeze()  # as a server does once it is up: what lives for ever need not be looked at again
    seconds = []
    try:
        for _ in range(steps):
            start = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - start)
    finally:
        gc.unfreeze()
    worst = sorted(seconds)[min(len(seconds) - 1, int(0.99 * len(seconds)))]
    return StepTime(running, waiting, statistics.median(seconds) * 1e3, worst * 1e3)
