"""What a step reads: chunks of requests, and how prompts share its budget; no tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from qoq.engine.request import Request


class Chunk(NamedTuple):
    """One request's part of a step: its ids start..stop-1 are read, and ``guessed`` ids behind
    them, which become its own only as far as the step proves them right.
    """

    request: Request
    start: int
    stop: int
    guessed: Sequence[int] = ()

    @property
    def end(self) -> int:
        """Behind the last place that is read, guesses included."""
        return self.stop + len(self.guessed)

    @property
    def num_rows(self) -> int:
        """Rows of the batch that it takes."""
        return self.end - self.start

    @property
    def num_next(self) -> int:
        """Tokens that may come of it where it reaches the end: the next, and one for each guess."""
        return 1 + len(self.guessed)

    @property
    def reaches_end(self) -> bool:
        """Whether the request's next token is known once this is read."""
        return self.stop == len(self.request.ids)


@dataclass(frozen=True)
class Plan:
    """A step: ``chunks``, those of one token first; ``admitted`` requests have new rows and pages,
    ``grown`` ones have more pages than before.
    """

    chunks: list[Chunk] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)
    grown: list[Request] = field(default_factory=list)


def cut(running: Sequence[Request], budget: int) -> list[Chunk]:
    """The next token of all that generate, and prompts while ``budget`` tokens last.

    The first prompt in line gets half the budget, and what no other wants; the others share the
    rest, the shortest first. So a long prompt neither holds up short ones nor waits for them.
    """
    chunks, prompts = [], []
    for request in running:
        length = len(request.ids)
        if length - request.num_cached == 1:
            chunks.append(Chunk(request, length - 1, length))
        else:
            prompts.append(request)
    if not prompts:
        return chunks
    left = budget - len(chunks)
    first, *others = prompts
    taken = {first.row: min(_unread(first), -(-left // 2))}
    left -= taken[first.row]
    for request in sorted(others, key=_unread):
        taken[request.row] = min(_unread(request), left)
        left -= taken[request.row]
    taken[first.row] += min(_unread(first) - taken[first.row], left)
    chunks += [
        Chunk(request, request.num_cached, request.num_cached + taken[request.row])
        for request in prompts
        if taken[request.row]
    ]
    return chunks


def _unread(request: Request) -> int:
    return len(request.ids) - request.num_cached
