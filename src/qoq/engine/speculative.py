"""Speculative decoding by prompt lookup: guess that what followed once follows again; no tensors.

A guess costs rows in the next forward pass, nothing else: the scheduler gives guesses only rows and
pages that nobody else needs, and the sampler keeps a guess only where the very same id is drawn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any
from weakref import WeakKeyDictionary

from qoq.engine.checks import is_int, require
from qoq.engine.request import Request
from qoq.errors import RequestError

MOST_TOKENS = 32


@dataclass(frozen=True)
class SpeculativeConfig:
    """How tokens are guessed; names are vLLM's. Bad values raise RequestError.

    At most num_speculative_tokens are guessed at a time: those that followed the latest earlier
    place with the same last n tokens, for the largest n from prompt_lookup_max down to
    prompt_lookup_min that has such a place. Short n-grams guess more, and are more often wrong.
    """

    num_speculative_tokens: int
    prompt_lookup_max: int = 3
    prompt_lookup_min: int = 3
    method: str = "ngram"

    def __post_init__(self) -> None:
        require(self.method == "ngram", self, "method", '"ngram", the only one there is')
        for name in ("num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min"):
            value = getattr(self, name)
            good = is_int(value) and 1 <= value <= MOST_TOKENS
            require(good, self, name, f"from 1 to {MOST_TOKENS}")
        ordered = self.prompt_lookup_min <= self.prompt_lookup_max
        most = f"prompt_lookup_max ({self.prompt_lookup_max}) at most"
        require(ordered, self, "prompt_lookup_min", most)

    @classmethod
    def of(
        cls, given: "SpeculativeConfig | Mapping[str, Any] | None"
    ) -> "SpeculativeConfig | None":
        """``given``, or the one that a mapping describes; None is off. Raises RequestError.

        Where a mapping has only one of prompt_lookup_max and prompt_lookup_min, it serves as both.
        """
        if given is None or isinstance(given, SpeculativeConfig):
            return given
        known = [field.name for field in fields(cls)]
        if not isinstance(given, Mapping) or "num_speculative_tokens" not in given:
            raise RequestError(
                "speculative_config must be a mapping with num_speculative_tokens, such as "
                '{"method": "ngram", "num_speculative_tokens": 4}.'
            )
        strange = next((name for name in given if name not in known), None)
        if strange is not None:
            raise RequestError(
                f"speculative_config has no {strange!r}; it takes {', '.join(known)}."
            )
        most = given.get("prompt_lookup_max", given.get("prompt_lookup_min", cls.prompt_lookup_max))
        sizes = {"prompt_lookup_max": most, "prompt_lookup_min": most}
        return cls(**{**sizes, **given})

    def __str__(self) -> str:
        return (
            f"up to {self.num_speculative_tokens} tokens guessed by prompt lookup (n-grams of "
            f"{self.prompt_lookup_max} to {self.prompt_lookup_min})"
        )


class PromptLookup:
    """Guesses for one text: what followed the latest earlier place that ends like it.

    Remembers where each n-gram was last followed by something, for n from min_ngram to max_ngram;
    a new token costs as many entries. The longest n-gram that is found decides.
    """

    def __init__(self, max_ngram: int, min_ngram: int) -> None:
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


def guesser(config: SpeculativeConfig | None) -> "LookupGuesser | None":
    """What an engine asks for guesses as ``config`` says; None: it makes none."""
    return None if config is None else LookupGuesser(config)


class LookupGuesser:
    """Guesses for any number of requests: a lookup for each, as long as it lives."""

    def __init__(self, config: SpeculativeConfig) -> None:
        self._config = config
        self._lookups: WeakKeyDictionary[Request, PromptLookup] = WeakKeyDictionary()

    def __call__(self, request: Request, count: int) -> list[int]:
        """At most ``count`` ids that may follow the request's own."""
        lookup = self._lookups.get(request)
        if lookup is None:
            config = self._config
            lookup = PromptLookup(config.prompt_lookup_max, config.prompt_lookup_min)
            self._lookups[request] = lookup
        return lookup.propose(request.ids, min(count, self._config.num_speculative_tokens))
