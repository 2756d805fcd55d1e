"""A decoder without weights that finds a text only where an engine says its pages are."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from qoq.engine.engine import Engine
from qoq.formats.scheme import KVFormat
from qoq.kvcache.pool import KVPool
from qoq.models.batch import Batch

PAGE = 4


class StubDecoder:
    """Remembers each slot's token and position, and reads a sequence back through its page table.

    ``batches`` are those it was given.
    """

    def __init__(
        self,
        vocab_size: int,
        logits_after: Callable[[Sequence[int]], Tensor],
        max_positions: int = 4096,
    ) -> None:
        """logits_after: a text's ids to the logits fp32 [V] of what follows."""
        self.config = SimpleNamespace(max_positions=max_positions, vocab_size=vocab_size)
        self.cache: dict[int, tuple[int, int]] = {}
        self.batches: list[Batch] = []
        self._logits_after = logits_after

    def __call__(
        self, batch: Batch, kv: Sequence[Any], rows: Tensor | None = None, *, backend: str
    ) -> Tensor:
        assert backend == "oracle"
        rows = torch.arange(batch.num_tokens) if rows is None else rows
        self.batches.append(batch)
        written = batch.slots.tolist()
        assert len(set(written)) == len(written), "two rows share a slot"
        for slot, token, at in zip(
            written, batch.input_ids.tolist(), batch.positions.tolist(), strict=True
        ):
            self.cache[slot] = (token, at)
        texts = self._texts(batch)
        lengths = [at + 1 for at in batch.positions.tolist()]
        owner = torch.bucketize(rows, batch.cu_seqlens_q[1:], right=True).tolist()
        logits = torch.zeros(len(rows), self.config.vocab_size)
        for i, (row, s) in enumerate(zip(rows.tolist(), owner, strict=True)):
            logits[i] = self._logits_after(texts[s][: lengths[row]])
        return logits

    def _texts(self, batch: Batch) -> list[list[int]]:
        """What the pages of each sequence say it holds."""
        texts = []
        for table, length in zip(batch.page_table.tolist(), batch.kv_lens.tolist(), strict=True):
            slots = [table[at // PAGE] * PAGE + at % PAGE for at in range(length)]
            held = [self.cache[slot] for slot in slots]
            assert [at for _, at in held] == list(range(length))
            texts.append([token for token, _ in held])
        return texts


def stub_engine(decoder: StubDecoder, num_pages: int = 64, **options: Any) -> Engine:
    """An engine with pages of PAGE tokens around it."""
    pool = KVPool(
        KVFormat(4, 4),
        num_layers=1,
        num_pages=num_pages,
        num_kv_heads=1,
        page_size=PAGE,
        head_dim=2,
    )
    return Engine(decoder, pool, backend="oracle", **options)  # type: ignore[arg-type]
