"""Speculative decoding by prompt lookup: guess that what followed once follows again, and verify.

A guess costs rows in the next forward pass, nothing else. The next token of a request is a pure
function of its logits, its seed and how many tokens it has (Gumbel-max with hashed noise), so it is
known at every guessed place at once: guesses are kept as long as they are what would be drawn.
The text is the one that decoding token by token gives, greedy or sampled.
"""

from collections.abc import Sequence

from torch import Tensor

from qoq.engine.request import Request
from qoq.engine.sampler import sampling_batch
from qoq.kernels.sample import sample


class PromptLookup:
    """Guesses for one request: what followed the latest earlier place that ends like the text.

    Remembers where each n-gram was last followed by something, for n from min_ngram to max_ngram;
    a new token costs as many entries. The longest n-gram that is found decides.
    """

    def __init__(self, *, max_ngram: int = 3, min_ngram: int = 1) -> None:
        assert 1 <= min_ngram <= max_ngram
        self._sizes = range(max_ngram, min_ngram - 1, -1)
        self._after: dict[tuple[int, ...], int] = {}
        self._seen = 0

    def propose(self, ids: Sequence[int], count: int) -> list[int]:
        """At most ``count`` ids that may follow ``ids``, which only ever grow between calls."""
        assert len(ids) >= self._seen
        # The n-gram that ends the text is followed by nothing yet, so it is not remembered.
        for end in range(max(self._seen, 1), len(ids)):
            for size in self._sizes:
                if size <= end:
                    self._after[tuple(ids[end - size : end])] = end
        self._seen = len(ids)
        for size in self._sizes:
            if size <= len(ids):
                at = self._after.get(tuple(ids[len(ids) - size :]))
                if at is not None:
                    return list(ids[at : at + count])
        return []


def may_guess(request: Request) -> bool:
    """Whether guesses can be verified for a request: rules on logits follow each token in turn."""
    return not request.params.shapes_logits


def guesses(request: Request, lookup: PromptLookup, count: int) -> list[int]:
    """Ids to run behind the request's last one: never more than it may still write but one."""
    room = request.max_length - len(request.ids) - 1
    if not may_guess(request) or room < 1:
        return []
    return lookup.propose(request.ids, min(count, room))


def verify(request: Request, logits: Tensor, guessed: Sequence[int]) -> list[tuple[int, float]]:
    """What the request writes next: (id, log-probability) of 1 to 1 + len(guessed) tokens.

    logits fp32 [1 + len(guessed), V]: after the request's last id and after each guessed one. The
    first token is always right; each further one is, as long as its guess was drawn before it.
    """
    first = request.num_new
    steps = [first + at for at in range(1 + len(guessed))]
    drawn = sample(logits, sampling_batch([request] * len(steps), steps, logits))
    tokens = list(zip(drawn.ids.tolist(), drawn.logprobs.tolist(), strict=True))
    right = 0
    while right < len(guessed) and tokens[right][0] == guessed[right]:
        right += 1
    return tokens[: right + 1]
