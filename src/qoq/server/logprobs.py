"""Logprobs on the wire: the chat shape and the older one of completions."""

from collections.abc import Sequence
from typing import Any

from qoq.tokenizer import Tokenizer

_LOWEST = -9999.0  # JSON has no -Infinity; clients of other servers know this number for it


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

    def chat(self, ids: Sequence[int], logprobs: Sequence[float]) -> dict[str, Any]:
        """``choices[].logprobs`` of chat completions."""
        return {
            "content": [
                {
                    "token": self.token(token_id),
                    "logprob": _finite(logprob),
                    "bytes": list(self.token(token_id).encode()),
                    "top_logprobs": [],
                }
                for token_id, logprob in zip(ids, logprobs, strict=True)
            ]
        }

    def completion(
        self, ids: Sequence[int], logprobs: Sequence[float], offset: int
    ) -> dict[str, Any]:
        """``choices[].logprobs`` of completions; ``offset``: characters of the text before."""
        tokens = [self.token(token_id) for token_id in ids]
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        numbers = [_finite(logprob) for logprob in logprobs]
        return {
            "tokens": tokens,
            "token_logprobs": numbers,
            "top_logprobs": [
                {token: number} for token, number in zip(tokens, numbers, strict=True)
            ],
            "text_offset": offsets,
        }


def _finite(logprob: float) -> float:
    return logprob if logprob > _LOWEST else _LOWEST
