"""Batch: the tensors that say which tokens one forward pass runs and where their KV rows lie."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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

    @property
    def last_rows(self) -> Tensor:
        """int64 [S]: the last row of each sequence, whose logits say the next token.

        Meaningless for sequences without rows.
        """
        return self.cu_seqlens_q[1:].to(torch.int64) - 1

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
        none = torch.zeros(0, dtype=torch.int64)
        tokens, positions, slots = [none], [none], [none]
        table = torch.zeros(len(ids), max(map(len, pages), default=0), dtype=torch.int32)
        ends, cumulative = [], [0]
        for s, (row, start, own) in enumerate(zip(ids, starts, pages, strict=True)):
            row_ids = torch.as_tensor(row, dtype=torch.int64).reshape(-1).cpu()
            end = start + row_ids.shape[0]
            if end > len(own) * page_size:
                raise ValueError(f"sequence {s}: {end} tokens in {len(own)} pages of {page_size}")
            own_ids = torch.tensor(own, dtype=torch.int64)
            at = torch.arange(start, end)
            tokens.append(row_ids)
            positions.append(at)
            slots.append(own_ids[at // page_size] * page_size + at % page_size)
            table[s, : len(own)] = own_ids.to(torch.int32)
            ends.append(end)
            cumulative.append(cumulative[-1] + row_ids.shape[0])
        return cls(
            torch.cat(tokens).to(device),
            torch.cat(positions).to(device),
            torch.cat(slots).to(device),
            table.to(device),
            torch.tensor(ends, dtype=torch.int32, device=device),
            torch.tensor(cumulative, dtype=torch.int32, device=device),
        )

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
