"""Logprobs on the wire: the chat shape and the older one of completions."""

from collections.abc import Mapping, Sequence
from typing import Any

from qoq.engine.request import Logprob
from qoq.tokenizer import Tokenizer

_LOWEST = -9999.0  # JSON has no -Infinity; clients of other servers know this number for it
# For each token the likeliest ones at its place: id -> logprob.
Likeliest = Sequence[Mapping[int, float]]


class LogprobWriter:
    """Writes tokens with their logprobs; remembers how each id reads inside a text.

    A token that is a part of a character reads as U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Some decoders treat the first id of a text differently, so each is read after another.
        self._before = tokenizer.encode("a", special=False)[-1:]
        self._prefix = tokenizer.decode(self._before, skip_special=False)
        self._seen: dict[int, str] = {}

    def token(self, token_id: int) -> str:
        """The text of one id in the middle of a text."""
        text = self._seen.get(token_id)
        if text is None:
            whole = self._tokenizer.decode([*self._before, token_id], skip_special=False)
            text = self._seen[token_id] = whole[len(self._prefix) :]
        return text

    def chat(
        self, ids: Sequence[int], logprobs: Sequence[float], likeliest: Likeliest | None = None
    ) -> dict[str, Any]:
        """``choices[].logprobs`` of chat completions."""
        tops = likeliest or [{}] * len(ids)  # none were asked for
        return {
            "content": [
                {
                    **self._entry(token_id, logprob),
                    "top_logprobs": [self._entry(i, value) for i, value in _ranked(top)],
                }
                for token_id, logprob, top in zip(ids, logprobs, tops, strict=True)
            ]
        }

    def completion(
        self,
        ids: Sequence[int],
        logprobs: Sequence[float | None],
        offset: int,
        likeliest: Likeliest | None = None,
    ) -> dict[str, Any]:
        """``choices[].logprobs`` of completions; ``offset``: characters of the text before.

        A prompt's first token has no logprob: None. ``top_logprobs`` always has the token itself.
        """
        offsets = []
        for token_id in ids:
            offsets.append(offset)
            offset += len(self.token(token_id))
        tops = []
        for token_id, logprob, top in zip(ids, logprobs, likeliest or [{}] * len(ids), strict=True):
            shown = {self.token(i): _finite(value) for i, value in _ranked(top)}
            if logprob is not None:
                shown.setdefault(self.token(token_id), _finite(logprob))
            tops.append(None if logprob is None else shown)
        return {
            "tokens": [self.token(token_id) for token_id in ids],
            "token_logprobs": [None if p is None else _finite(p) for p in logprobs],
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def ranked(self, tops: Sequence[Mapping[int, Logprob] | None]) -> list[dict[str, Any] | None]:
        """``choices[].prompt_logprobs``: id -> logprob, rank and text; None for the first."""
        return [
            None
            if top is None
            else {
                str(i): {
                    "logprob": _finite(told.logprob),
                    "rank": told.rank,
                    "decoded_token": self.token(i),
                }
                for i, told in top.items()
            }
            for top in tops
        ]

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        token = self.token(token_id)
        return {"token": token, "logprob": _finite(logprob), "bytes": list(token.encode())}


def best(tops: Sequence[Mapping[int, Logprob] | None], count: int) -> list[dict[int, float]]:
    """The ``count`` likeliest at each place, of what the engine tells."""
    return [
        {i: told.logprob for i, told in (top or {}).items() if told.rank <= count} for top in tops
    ]


def _ranked(top: Mapping[int, float]) -> list[tuple[int, float]]:
    """The likeliest first."""
    return sorted(top.items(), key=lambda item: (-item[1], item[0]))


def _finite(logprob: float) -> float:
    return logprob if logprob > _LOWEST else _LOWEST
