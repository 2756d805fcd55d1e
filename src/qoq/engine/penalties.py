"""Penalties on what a prompt and its text already hold: one gather, one scatter for a batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qoq.engine.request import Request


class Tally:
    """The distinct ids of one request and how often its new text holds each, kept as it grows.

    ``ids`` int64 [U]; ``counts`` fp32 [U], 0 for ids of the prompt alone, which are there only if
    repetition counts them. Nothing here is as long as the vocabulary.
    """

    def __init__(self, request: Request, device: torch.device) -> None:
        self.params = request.params
        self._device = device
        self._seen = 0
        self._restart(request)

    @property
    def ids(self) -> Tensor:
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> Tensor:
        return self._counts[: len(self._places)]

    def catch_up(self, request: Request) -> None:
        """Take in the ids of the same request that came since the last call."""
        ids = request.ids
        if len(ids) < self._seen:
            self._restart(request)  # ids were taken back
        for token_id in ids[self._seen :]:
            place = self._places.get(token_id)
            if place is None:
                place = self._append(token_id)
            self._counts[place] += 1
        self._seen = len(ids)

    def _restart(self, request: Request) -> None:
        repeats = request.params.repetition_penalty != 1
        known = list(dict.fromkeys(request.prompt_ids)) if repeats else []
        self._places = {token_id: place for place, token_id in enumerate(known)}
        room = max(64, 2 * len(known))
        self._ids = torch.zeros(room, dtype=torch.int64, device=self._device)
        self._ids[: len(known)] = torch.tensor(known, dtype=torch.int64)
        self._counts = torch.zeros(room, dtype=torch.float32, device=self._device)
        self._seen = len(request.prompt_ids)

    def _append(self, token_id: int) -> int:
        place = self._places[token_id] = len(self._places)
        if place == self._ids.shape[0]:
            self._ids = torch.cat([self._ids, torch.zeros_like(self._ids)])
            self._counts = torch.cat([self._counts, torch.zeros_like(self._counts)])
        self._ids[place] = token_id
        return place


def penalize(logits: Tensor, rows: Sequence[int], tallies: Sequence[Tally]) -> None:
    """Change ``rows`` of logits fp32 [S, V] in place, each by its request's penalties.

    A logit x of an id that appears becomes x / r if it is positive, else x * r, where r is the
    repetition penalty; then x - frequency_penalty * count - presence_penalty (count > 0).
    """
    sizes = torch.tensor([tally.ids.shape[0] for tally in tallies], device=logits.device)
    params = [tally.params for tally in tallies]

    def each(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        column = torch.tensor(values, dtype=dtype, device=logits.device)
        return column.repeat_interleave(sizes)

    at = each(rows, torch.int64)
    ids = torch.cat([tally.ids for tally in tallies])
    counts = torch.cat([tally.counts for tally in tallies])
    x = logits[at, ids]
    repetition = each([p.repetition_penalty for p in params])
    x = torch.where(x > 0, x / repetition, x * repetition)
    x = x - each([p.frequency_penalty for p in params]) * counts
    x = x - each([p.presence_penalty for p in params]) * (counts > 0)
    logits[at, ids] = x
