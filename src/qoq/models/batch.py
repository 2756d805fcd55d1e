"""Batch: the tensors that say which tokens one forward pass runs and where their KV rows lie."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """T tokens of S sequences, ragged: prefill chunks and decode rows in one list.

    input_ids, positions, slots int64 [T]; page_table int32 [S, max_pages] (unused entries 0);
    kv_lens int32 [S] = cached tokens after this pass; cu_seqlens_q int32 [S+1] = where each
    sequence's rows begin. Slot = page * page_size + offset; -1 for padding rows.
    Example: two prompts of 3 and 5 tokens, page_size 4: T = 8, cu_seqlens_q [0, 3, 8],
    page_table [[0, 0], [1, 2]], slots [0, 1, 2, 4, 5, 6, 7, 8].
    """

    input_ids: Tensor
    positions: Tensor
    slots: Tensor
    page_table: Tensor
    kv_lens: Tensor
    cu_seqlens_q: Tensor

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_pages(self) -> int:
        """Pages a pool must have for this batch: its highest page id + 1."""
        return int(self.page_table.max()) + 1 if self.page_table.numel() else 0

    @classmethod
    def build(
        cls,
        ids: Sequence[Sequence[int] | Tensor],
        starts: Sequence[int],
        pages: Sequence[Sequence[int]],
        page_size: int,
        device: torch.device | str = "cpu",
    ) -> "Batch":
        """Run ``ids[s]`` at positions ``starts[s]..`` of sequence s, which owns ``pages[s]``.

        The pages, in order, must hold every token up to the last new one, else ValueError.
        """
        if not len(ids) == len(starts) == len(pages):
            raise ValueError(f"{len(ids)} id lists, {len(starts)} starts, {len(pages)} page lists")
        rows = [np.asarray(row, dtype=np.int64).reshape(-1) for row in ids]
        counts = np.array([len(row) for row in rows], dtype=np.int64)
        table = np.zeros((len(pages), max(map(len, pages), default=0)), dtype=np.int32)
        for s, (start, count, own) in enumerate(zip(starts, counts, pages, strict=True)):
            if start + count > len(own) * page_size:
                held = f"{len(own)} pages of {page_size}"
                raise ValueError(f"sequence {s}: {start + count} tokens in {held}")
            table[s, : len(own)] = own
        flat = np.concatenate([np.zeros(0, dtype=np.int64), *rows])
        return cls.ragged(flat, np.array(starts, dtype=np.int64), counts, table, page_size, device)

    @classmethod
    def ragged(
        cls,
        ids: Ints,
        starts: Ints,
        counts: Ints,
        table: NDArray[np.int32],
        page_size: int,
        device: torch.device | str = "cpu",
    ) -> "Batch":
        """Sequence s runs the next ``counts[s]`` of ``ids`` at positions ``starts[s]..``.

        ids int64 [T]; starts, counts int64 [S]; table int32 [S, max_pages], whose pages must hold
        every token (not checked). No loop in Python, whatever T and S are.
        """
        ends = np.zeros(len(counts) + 1, dtype=np.int32)
        np.cumsum(counts, out=ends[1:])
        positions = np.arange(len(ids)) + np.repeat(starts - ends[:-1], counts)
        page, offset = np.divmod(positions, page_size)
        slots = table[np.repeat(np.arange(len(counts)), counts), page] * np.int64(page_size)
        slots += offset
        kv_lens = (starts + counts).astype(np.int32)
        arrays = (ids, positions, slots, table, kv_lens, ends)
        return cls(*(torch.from_numpy(array).to(device) for array in arrays))

    @classmethod
    def prefill(
        cls,
        ids: Sequence[Sequence[int] | Tensor],
        page_size: int,
        device: torch.device | str = "cpu",
    ) -> "Batch":
        """Whole sequences from position 0, on pages 0.. in order: needs ``num_pages`` pages."""
        pages: list[range] = []
        used = 0
        for row in ids:
            count = -(-len(row) // page_size)
            pages.append(range(used, used + count))
            used += count
        return cls.build(ids, [0] * len(ids), pages, page_size, device)
