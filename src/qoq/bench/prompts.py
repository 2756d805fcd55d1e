"""What a load test asks: requests drawn from a seed, or read from a file."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qoq.errors import RequestError
from qoq.tokenizer import Tokenizer

# Words that common vocabularies hold as one token each, so that a text's words and tokens are about
# as many where no tokenizer is at hand.
_WORDS = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government "
    "number night point home water room mother area money story fact month lot right study book "
    "eye job word business issue side kind head house service friend father power hour game line "
    "end member law car city community name president team minute idea kid body information back "
    "parent face others level office door health person art war history party result change "
    "morning reason research girl guy moment air teacher force education"
)


@dataclass(frozen=True)
class Ask:
    """One request: a text to continue, or a conversation to answer, and new tokens at most."""

    prompt: str
    max_tokens: int
    messages: Sequence[dict[str, Any]] | None = None


class Writer:
    """Random texts of a number of tokens: exactly so with a tokenizer, about so without."""

    def __init__(self, seed: int, tokenizer: Tokenizer | None = None) -> None:
        self._draw = random.Random(seed)
        self._tokenizer = tokenizer
        self._words = _WORDS.split()

    def between(self, length: int, ratio: float) -> int:
        """A length from (1 - ratio) to (1 + ratio) times ``length``, 1 at least."""
        low, high = int(length * (1 - ratio)), int(length * (1 + ratio))
        return max(1, self._draw.randint(low, high))

    def text(self, tokens: int) -> str:
        """``tokens`` tokens of random words."""
        text = " ".join(self._draw.choices(self._words, k=tokens))
        if self._tokenizer is None:
            return text
        ids = self._tokenizer.encode(text, special=False)  # as many as there are words, or more
        return self._tokenizer.decode(ids[:tokens]) if tokens else ""

    def pick(self, count: int) -> int:
        """A number below ``count``."""
        return self._draw.randrange(count)


def random_asks(
    writer: Writer,
    count: int,
    *,
    input_len: int,
    output_len: int,
    range_ratio: float = 0.0,
    prefix_len: int = 0,
) -> list[Ask]:
    """``count`` requests of random text; lengths vary by ``range_ratio`` around those given, in
    tokens; all begin with the same ``prefix_len`` tokens.
    """
    if not 0 <= range_ratio < 1:
        raise RequestError(f"--random-range-ratio must be from 0 to below 1, not {range_ratio}.")
    if input_len < 1 or output_len < 1 or prefix_len < 0:
        raise RequestError("Input and output lengths must be 1 or more, prefix lengths 0 or more.")
    prefix = _lead(writer, prefix_len)
    return [
        Ask(
            prefix + writer.text(writer.between(input_len, range_ratio)),
            writer.between(output_len, range_ratio),
        )
        for _ in range(count)
    ]


def prefix_asks(
    writer: Writer,
    count: int,
    *,
    prefix_len: int,
    suffix_len: int,
    num_prefixes: int,
    output_len: int,
) -> list[Ask]:
    """``count`` requests that begin with one of ``num_prefixes`` shared texts, in random order.

    Each prefix is used as often as any other (or once more). Lengths are in tokens.
    """
    if num_prefixes < 1 or prefix_len < 1 or suffix_len < 1 or output_len < 1:
        raise RequestError("Prefixes, their number, suffixes and outputs must be 1 or more.")
    prefixes = [_lead(writer, prefix_len) for _ in range(num_prefixes)]
    asks = [
        Ask(prefixes[i % num_prefixes] + writer.text(suffix_len), output_len) for i in range(count)
    ]
    return [asks.pop(writer.pick(len(asks))) for _ in range(count)]


def file_asks(path: Path, count: int | None, output_len: int | None) -> list[Ask]:
    """Requests of a JSONL file, in its order, again from the start if there are too few.

    Each line has "prompt", or "messages"; "output_tokens" or "max_tokens" where ``output_len`` is
    None. ``count`` None takes each line once. Raises RequestError naming the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"The dataset {path} cannot be read: {error}") from error
    asks = [
        _ask(line, f"{path}:{number}", output_len)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not asks:
        raise RequestError(f"The dataset {path} has no lines.")
    return asks if count is None else [asks[i % len(asks)] for i in range(count)]


def _lead(writer: Writer, length: int) -> str:
    return writer.text(length) + " " if length else ""


def _ask(line: str, where: str, output_len: int | None) -> Ask:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise RequestError(f"{where} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise RequestError(f"{where} must be an object with a prompt.")
    messages, prompt = value.get("messages"), value.get("prompt")
    if messages is None and not isinstance(prompt, str):
        raise RequestError(f'{where} has neither a "prompt" (text) nor "messages".')
    tokens = output_len or value.get("output_tokens") or value.get("max_tokens") or 256
    if not isinstance(tokens, int) or tokens < 1:
        raise RequestError(f"{where}: the number of new tokens must be 1 or more, not {tokens!r}.")
    if messages is not None and prompt is None:
        prompt = "\n".join(str(message.get("content", "")) for message in messages)
    return Ask(str(prompt), tokens, messages)
