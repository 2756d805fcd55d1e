"""Chunks of a streamed answer, from /v1/completions and /v1/chat/completions alike."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qoq.errors import ServerError

DONE = "[DONE]"


@dataclass(frozen=True)
class Piece:
    """What one chunk brings: some text, perhaps why the text ends, perhaps the counts of tokens."""

    text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


def piece_of(data: str) -> Piece:
    """A chunk's JSON as a Piece. Raises ServerError for an error on the stream and for no JSON."""
    try:
        chunk = json.loads(data)
    except ValueError:
        chunk = None
    if not isinstance(chunk, dict):
        raise ServerError(f"The server sent what is no chunk: {data[:200]!r}.", "stream_error")
    if chunk.get("error"):
        raise ServerError(f"The server broke off: {error_text(chunk)}", "stream_error")
    usage = chunk.get("usage") or {}
    choices = chunk.get("choices") or [{}]
    first = choices[0] if isinstance(choices[0], dict) else {}
    delta = first.get("delta") or {}
    # Reasoning models send their thoughts under names of their own; they cost tokens too.
    thought = delta.get("reasoning_content") or delta.get("reasoning") or ""
    return Piece(
        text=str(first.get("text") or delta.get("content") or thought),
        finish_reason=first.get("finish_reason"),
        prompt_tokens=usage.get("prompt_tokens"),
        completion_tokens=usage.get("completion_tokens"),
    )


def error_text(body: Mapping[str, Any] | str) -> str:
    """The sentence in an error's body, in OpenAI's shape or in whatever shape it came."""
    if isinstance(body, str):
        try:
            parsed = json.loads(body)
        except ValueError:
            return body.strip()[:300] or "no reason given"
        body = parsed if isinstance(parsed, dict) else {"message": parsed}
    error = body.get("error", body)
    if isinstance(error, Mapping):
        error = error.get("message") or error.get("detail") or dict(error)
    return str(error)[:500]
