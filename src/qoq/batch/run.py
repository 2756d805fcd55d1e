"""A whole batch: lines in, the engine kept full, finished lines out."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from qoq.api.calling import blame_tools
from qoq.api.logprobs import LogprobWriter
from qoq.batch.lines import (
    Asked,
    BadLine,
    Model,
    answer,
    asked,
    line_id,
    malformed,
    read_line,
    refusal,
)
from qoq.batch.results import Results
from qoq.engine.engine import Engine
from qoq.engine.feed import Job, keep_full
from qoq.engine.request import Output
from qoq.errors import RequestError, SourceError


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


@dataclass(eq=False)
class _Open:
    """A line whose texts are on their way."""

    asked: Asked
    outputs: dict[int, Output]
    refused: bool = False


def run_batch(
    engine: Engine,
    source: Path,
    results: Results,
    *,
    model: Model,
    ahead: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tally:
    """Answer every line of ``source`` that ``results`` does not have yet, then publish them.

    ``ahead`` texts are in the engine at a time; ``progress`` is told lines done and lines in all.
    Raises SourceError for a source that cannot be read.
    """
    tally = Tally(total=sum(1 for _ in _lines(source)), resumed=results.resumed)
    writer = LogprobWriter(model.tokenizer)

    def count() -> None:
        tally.done += 1
        progress(tally.done, tally.total)

    def jobs() -> Iterator[Job[tuple[_Open, int]]]:
        """The texts of lines that can be run; the others are answered at once."""
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
                one = _Open(asked(line, model), {})
            except RequestError as error:
                results.write(refusal(line, error))
                count()
                continue
            for index, params in enumerate(one.asked.params):
                yield Job((one, index), one.asked.prompt, params)

    for (one, index), result in keep_full(engine, jobs(), ahead=ahead):
        if isinstance(result, RequestError):
            if not one.refused:  # what is said of one of its texts is said of all
                results.write(refusal(one.asked.line, blame_tools(result, one.asked.plan)))
                count()
            one.refused = True
            continue
        one.outputs[index] = result
        if len(one.outputs) < len(one.asked.params):
            continue
        outputs = [one.outputs[at] for at in range(len(one.outputs))]
        results.write(answer(one.asked, outputs, model, writer))
        tally.prompt_tokens += len(one.asked.prompt)
        tally.tokens += sum(len(output.token_ids) for output in outputs)
        count()
    results.publish()
    tally.failed = results.failed
    return tally


def _lines(source: Path) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of every line that is not empty."""
    try:
        with source.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if raw.strip():
                    yield number, raw.strip()
    except OSError as error:
        raise SourceError(f"{source} cannot be read: {error.strerror or error}.") from error
