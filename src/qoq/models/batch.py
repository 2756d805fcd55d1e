"""Batch: the tensors that say which tokens one forward pass runs and where their KV rows lie."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class BatchShape:
    """Sizes of a batch's tensors: ``tokens`` rows, ``sequences``, ``pages`` in each's table."""

    tokens: int
    sequences: int
    pages: int

    def flat(self, device: torch.device | str = "cpu", *, pinned: bool = False) -> Tensor:
        """Uninitialised memory int32 [n] for all tensors of such a batch together."""
        count = sum(self._words)
        return torch.empty(count, dtype=torch.int32, device=device, pin_memory=pinned)

    def padding(self) -> Tensor:
        """Memory of the CPU for a batch that reads and writes nothing: rows of no sequence."""
        flat = self.flat()
        none = np.zeros(0, dtype=np.int64)
        self.views(flat).fill(none, none, none, np.zeros((0, 0), dtype=np.int32), 1)
        return flat

    def views(self, flat: Tensor) -> "Batch":
        """The batch whose tensors lie in ``flat`` one after the other."""
        ids, positions, slots, table, kv_lens, ends = flat.split(self._words)
        return Batch(
            ids.view(torch.int64),
            positions.view(torch.int64),
            slots.view(torch.int64),
            table.view(self.sequences, self.pages),
            kv_lens,
            ends,
        )

    @property
    def _words(self) -> list[int]:
        tokens, sequences = 2 * self.tokens, self.sequences
        return [tokens, tokens, tokens, sequences * self.pages, sequences, sequences + 1]


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
        shape = BatchShape(len(ids), len(counts), table.shape[1])
        where = torch.device(device)
        # In one piece, so that one copy brings it to a GPU; pinned, so that nobody waits for it.
        flat = shape.flat(pinned=where.type == "cuda")
        batch = shape.views(flat)
        batch.fill(ids, starts, counts, table, page_size)
        return batch if where.type == "cpu" else shape.views(flat.to(where, non_blocking=True))

    def fill(
        self, ids: Ints, starts: Ints, counts: Ints, table: NDArray[np.int32], page_size: int
    ) -> None:
        """Overwrite a batch in CPU memory; what it has beyond these tokens, sequences and pages
        becomes padding: rows of no sequence, sequences without rows (see ``ragged``).
        """
        tokens, sequences, pages = len(ids), len(counts), table.shape[1]
        ends = self.cu_seqlens_q.numpy()
        ends[0] = 0
        np.cumsum(counts, out=ends[1 : sequences + 1])
        ends[sequences + 1 :] = tokens
        positions = self.positions.numpy()
        positions[:tokens] = np.arange(tokens)
        positions[:tokens] += np.repeat(starts - ends[:sequences], counts)
        positions[tokens:] = 0
        page, offset = np.divmod(positions[:tokens], page_size)
        slots = self.slots.numpy()
        slots[:tokens] = table[np.repeat(np.arange(sequences), counts), page]
        slots[:tokens] *= page_size
        slots[:tokens] += offset
        slots[tokens:] = -1
        own_ids, own_table, kv_lens = (
            tensor.numpy() for tensor in (self.input_ids, self.page_table, self.kv_lens)
        )
        own_ids[:tokens], own_ids[tokens:] = ids, 0
        own_table[:sequences, :pages] = table
        own_table[:sequences, pages:] = 0
        own_table[sequences:] = 0
        kv_lens[:sequences], kv_lens[sequences:] = starts + counts, 0

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
