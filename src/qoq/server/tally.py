"""Tally: the usage of one answer, counted as its texts grow."""

from collections.abc import Sequence
from typing import Any

from qoq.api.protocol import usage
from qoq.server.generation import Delta


class Tally:
    """Counts tokens over all texts of an answer; a prompt counts once, whatever ``n`` is."""

    def __init__(self, prompts: Sequence[Sequence[int]]) -> None:
        self.prompt_tokens = sum(len(ids) for ids in prompts)
        self.completion_tokens = 0
        self._cached: dict[int, int] = {}

    def add(self, prompt: int, delta: Delta) -> None:
        """``delta`` belongs to a text of prompt number ``prompt``."""
        self.completion_tokens += len(delta.token_ids)
        # Later texts of a prompt find all of it in the cache; the first says what there was.
        self._cached.setdefault(prompt, delta.cached_tokens)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens found in the prefix cache."""
        return sum(self._cached.values())

    def usage(self) -> dict[str, Any]:
        """The ``usage`` object so far."""
        return usage(self.prompt_tokens, self.completion_tokens, self.cached_tokens)

    def counts(self) -> dict[str, int]:
        """The same for a line of the log."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cached_tokens": self.cached_tokens,
        }
