"""A sampler's step without an engine around it."""

from collections.abc import Sequence

from torch import Tensor

from qoq.engine.plan import Chunk, Plan
from qoq.engine.request import Request, Update
from qoq.engine.rows import Rows
from qoq.engine.sampler import Sampler


def choose(
    sampler: Sampler,
    requests: Sequence[Request],
    logits: Tensor,
    guessed: Sequence[Sequence[int]] | None = None,
) -> list[Update]:
    """A token for each request from its row of logits, and more for its right guesses."""
    chunks = [
        Chunk(request, len(request.ids) - 1, len(request.ids), ids)
        for request, ids in zip(requests, guessed or [()] * len(requests), strict=True)
    ]
    rows = Rows(len(requests), 1, 1, logits.device)
    for row, request in enumerate(requests):
        request.row = row
    rows.follow(Plan(chunks, admitted=list(requests)))
    return sampler.choose(chunks, logits, rows.sampling(chunks))
