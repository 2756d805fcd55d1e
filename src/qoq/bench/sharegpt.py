"""Requests from recorded conversations in ShareGPT's JSON, chosen as vLLM's bench does."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qoq.bench.prompts import Ask
from qoq.errors import RequestError
from qoq.tokenizer import Tokenizer

# What vLLM's bench keeps, in tokens: nothing too short to tell of, nothing beyond small models.
SHORTEST = 4
LONGEST_PROMPT = 1024
LONGEST_TOTAL = 2048


def sharegpt_asks(
    path: Path,
    count: int,
    seed: int,
    tokenizer: Tokenizer | None = None,
    *,
    output_len: int | None = None,
) -> list[Ask]:
    """``count`` first turns of conversations, in an order drawn from ``seed``.

    Each asks for as many tokens as the recorded answer has, or ``output_len``. If there are too
    few, they come again from the first. The file holds
    [{"conversations": [{"from": ..., "value": text}, ...]}, ...]. Left out: conversations of fewer
    than two turns; prompts and answers of fewer than SHORTEST tokens; prompts above LONGEST_PROMPT,
    and above LONGEST_TOTAL with their answer. Tokens are ``tokenizer``'s, else words. Raises
    RequestError naming the file.
    """
    if output_len is not None and output_len < 1:
        raise RequestError(f"--sharegpt-output-len must be 1 or more, not {output_len}.")
    turns = [turn for entry in _read(path) if (turn := _first_turn(entry)) is not None]
    random.Random(seed).shuffle(turns)
    asks: list[Ask] = []
    for prompt, answer in turns:
        length = _count(tokenizer, prompt)
        tokens = output_len or _count(tokenizer, answer)
        enough = length >= SHORTEST and (output_len is not None or tokens >= SHORTEST)
        if enough and length <= LONGEST_PROMPT and length + tokens <= LONGEST_TOTAL:
            asks.append(Ask(prompt, tokens))
        if len(asks) == count:
            break
    if not asks:
        raise RequestError(
            f"No conversation in {path} has a first turn of {SHORTEST} to {LONGEST_PROMPT} tokens "
            f"with an answer that fits {LONGEST_TOTAL} tokens in all."
        )
    return [asks[i % len(asks)] for i in range(count)]


def _read(path: Path) -> list[Any]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"The dataset {path} cannot be read as JSON: {error}.") from error
    if not isinstance(entries, list):
        raise RequestError(f"The dataset {path} is not ShareGPT's: it must be a list of objects.")
    return entries


def _first_turn(entry: Any) -> tuple[str, str] | None:
    """What was said first, and the answer; None where there are not both."""
    turns = entry.get("conversations") if isinstance(entry, Mapping) else None
    if not isinstance(turns, list) or len(turns) < 2:
        return None
    said = [turn.get("value") if isinstance(turn, Mapping) else None for turn in turns[:2]]
    prompt, answer = said
    return (prompt, answer) if isinstance(prompt, str) and isinstance(answer, str) else None


def _count(tokenizer: Tokenizer | None, text: str) -> int:
    return len(text.split()) if tokenizer is None else len(tokenizer.encode(text))
