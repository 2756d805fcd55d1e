"""Rows: what a step's tensors need of the requests that run, kept in arrays as they change.

A request's pages and sampling parameters are written once, when it is let in, and a page more when
it grows; a step gathers its rows from them.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from qoq.engine.plan import Chunk, Plan
from qoq.engine.request import Request
from qoq.kernels.sample import SamplingBatch
from qoq.models.batch import Batch

_HOTTEST = 1e30  # fits fp32, and leaves nothing of any difference between logits
_SAMPLING = np.dtype(
    [
        ("temperature", np.float32),
        ("top_k", np.int64),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("seed", np.int64),
    ]
)


class Rows:
    """Arrays with a row per running request; ``Request.row`` says which."""

    def __init__(
        self, max_requests: int, max_pages: int, page_size: int, device: torch.device | str
    ) -> None:
        """max_pages: the most that one request can have."""
        self._page_size = page_size
        self._device = torch.device(device)
        self._table = np.zeros((max_requests, max_pages), dtype=np.int32)
        self._sampling = np.zeros(max_requests, dtype=_SAMPLING)

    def follow(self, plan: Plan) -> None:
        """Take over what a plan has changed."""
        for request in plan.admitted:
            params = request.params
            self._sampling[request.row] = (
                min(params.temperature, _HOTTEST),
                params.top_k,
                params.top_p,
                params.min_p,
                request.seed,
            )
            self._table[request.row, : len(request.pages)] = request.pages
        for request in plan.grown:
            self._table[request.row, : len(request.pages)] = request.pages

    def batch(self, chunks: Sequence[Chunk]) -> Batch:
        """The tensors that read these chunks."""
        return Batch.ragged(*self._arrays(chunks), self._page_size, self._device)

    def fill(self, batch: Batch, chunks: Sequence[Chunk]) -> None:
        """Make a batch in CPU memory, with room to spare, one that reads these chunks."""
        batch.fill(*self._arrays(chunks), self._page_size)

    def pages(self, chunks: Sequence[Chunk]) -> int:
        """Of the longest of them, when they are read."""
        longest = max(chunk.end for chunk in chunks)
        return -(-longest // self._page_size)

    def _arrays(
        self, chunks: Sequence[Chunk]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
        """ids, starts, counts and page table, as ``Batch.ragged`` takes them."""
        starts = np.array([chunk.start for chunk in chunks], dtype=np.int64)
        stops = np.array([chunk.end for chunk in chunks], dtype=np.int64)
        ids: list[int] = []
        for request, start, stop, guessed in chunks:
            if stop - start == 1:
                ids.append(request.ids[start])
            else:
                ids += request.ids[start:stop]
            ids += guessed
        rows = self._of([chunk.request for chunk in chunks])
        table = self._table[rows, : self.pages(chunks)]
        return np.array(ids, dtype=np.int64), starts, stops - starts, table

    @staticmethod
    def next_rows(chunks: Sequence[Chunk]) -> tuple[list[Chunk], list[int]]:
        """The chunks that reach their request's end, and the batch's rows whose logits say what
        comes then: ``num_next`` for each of them.
        """
        ending: list[Chunk] = []
        rows: list[int] = []
        end = 0
        for chunk in chunks:
            end += chunk.num_rows
            if chunk.reaches_end:
                ending.append(chunk)
                rows += range(end - chunk.num_next, end)
        return ending, rows

    def sampling(self, chunks: Sequence[Chunk]) -> SamplingBatch:
        """How the token after each chunk is chosen, and those after its guesses: ``num_next`` rows
        for each chunk. Randomness hangs on the seed and the token's number alone.
        """
        counts = [chunk.num_next for chunk in chunks]
        wanted = self._sampling[np.repeat(self._of([c.request for c in chunks]), counts)]
        steps = [chunk.request.num_new + at for chunk in chunks for at in range(chunk.num_next)]
        # As with a batch: one copy brings all to a GPU, and nobody waits for it.
        cuda = self._device.type == "cuda"
        flat = torch.empty(9 * len(steps), dtype=torch.int32, pin_memory=cuda)
        columns = [*(wanted[name] for name in _SAMPLING.names or ()), np.array(steps)]
        for own, values in zip(_columns(flat), columns, strict=True):
            own.numpy()[:] = values
        if cuda:
            flat = flat.to(self._device, non_blocking=True)
        return SamplingBatch(*_columns(flat))

    def _of(self, requests: Sequence[Request]) -> NDArray[np.int64]:
        return np.array([request.row for request in requests], dtype=np.int64)


def _columns(flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The columns of a SamplingBatch of S rows, in its order, as they lie in flat int32 [9 S]."""
    count = len(flat) // 9
    top_k, seeds, step = flat[: 6 * count].view(torch.int64).view(3, count)
    temperature, top_p, min_p = flat[6 * count :].view(torch.float32).view(3, count)
    return temperature, top_k, top_p, min_p, seeds, step
