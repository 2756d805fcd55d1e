"""A whole batch: lines in, the engine kept full, finished lines out."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qoq.batch.lines import (
    BadLine,
    Line,
    answer,
    line_id,
    malformed,
    params_of,
    prompt_ids,
    read_line,
    refusal,
)
from qoq.batch.results import Results
from qoq.engine.engine import Engine
from qoq.engine.feed import Job, keep_full
from qoq.engine.request import Output
from qoq.errors import RequestError, SourceError
from qoq.tokenizer import Tokenizer

_DEFAULTS = ("temperature", "top_p", "top_k", "min_p")


@dataclass
class Tally:
    """Counts of one run: lines in all, those of earlier runs among them, failures, new tokens."""

    total: int = 0
    resumed: int = 0
    done: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    tokens: int = 0

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


def run_batch(
    engine: Engine,
    tokenizer: Tokenizer,
    source: Path,
    results: Results,
    *,
    model: str,
    defaults: Mapping[str, Any],
    ahead: int,
    context: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tally:
    """Answer every line of ``source`` that ``results`` does not have yet, then publish them.

    model is the name in the answers; defaults are those of ``sampling_defaults``; ``ahead``
    requests are in the engine at a time; context bounds a request in tokens; ``progress`` is told
    lines done and lines in all. Raises SourceError for a source that cannot be read.
    """
    tally = Tally(total=sum(1 for _ in _lines(source)), resumed=results.resumed)

    def count() -> None:
        tally.done += 1
        progress(tally.done, tally.total)

    def jobs() -> Iterator[Job[Line]]:
        """The lines that can be run; the others are answered at once."""
        seen: set[str] = set()
        for number, raw in _lines(source):
            own_id = line_id(number, raw)
            try:
                line = read_line(number, raw)
                if line.custom_id in seen:
                    raise BadLine(f"Line {number} repeats a custom_id.", line.custom_id)
            except BadLine as error:
                if not results.has(own_id):
                    results.write(malformed(own_id, error))
                count()
                continue
            seen.add(line.custom_id)
            if results.has(own_id, line.custom_id):
                count()
                continue
            try:
                params = params_of(line, defaults, context)
                ids = prompt_ids(line, tokenizer.encode, tokenizer.encode_chat)
            except RequestError as error:
                results.write(refusal(line, error))
                count()
                continue
            yield Job(line, ids, params)

    for line, result in keep_full(engine, jobs(), ahead=ahead):
        if isinstance(result, Output):
            results.write(answer(line, str(line.body.get("model") or model), result))
            tally.prompt_tokens += len(result.prompt_token_ids)
            tally.tokens += len(result.token_ids)
        else:
            results.write(refusal(line, result))
        count()
    results.publish()
    tally.failed = results.failed
    return tally


def sampling_defaults(folder: Path) -> dict[str, Any]:
    """What the model's generation_config.json says of sampling; {} where there is none.

    Raises SourceError for a file that cannot be read.
    """
    file = folder / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {name: found[name] for name in _DEFAULTS if found.get(name) is not None}
    except (OSError, ValueError, AttributeError) as error:
        raise SourceError(f"{file} is not a readable JSON object: {error}") from error


def _lines(source: Path) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of every line that is not empty."""
    try:
        with source.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if raw.strip():
                    yield number, raw.strip()
    except OSError as error:
        raise SourceError(f"{source} cannot be read: {error.strerror or error}.") from error
