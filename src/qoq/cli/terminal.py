"""What every verb shares: errors as one sentence, JSON alone on stdout, progress on stderr."""

import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, ParamSpec

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from qoq.errors import QoqError

P = ParamSpec("P")
INTERRUPTED = 130
LINE_SECONDS = 10  # between lines of progress where there is no terminal to draw a bar on


def verb(hint: str = "") -> Callable[[Callable[P, None]], Callable[P, None]]:
    """A command's errors become one sentence on stderr and status 1; Ctrl-C gives 130 and ``hint``.

    Other exceptions are bugs and keep their traceback.
    """

    def wrap(command: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(command)
        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            try:
                command(*args, **kwargs)
            except KeyboardInterrupt:
                fail("interrupted." + (f" {hint}" if hint else ""), INTERRUPTED)
            except BrokenPipeError:
                # Whoever read our output has gone (as with `| head`): nothing is left to say.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise typer.Exit(1) from None
            except QoqError as error:
                fail(str(error))
            except MemoryError:
                fail("memory ran out. Close other programs or use a smaller model.")
            except OSError as error:
                where = f": {error.filename}" if error.filename else ""
                fail(f"{error.strerror or error}{where}.")

        return run

    return wrap


def fail(sentence: str, status: int = 1) -> NoReturn:
    """Print one sentence to stderr and leave with ``status``."""
    note(f"qoq: {sentence}")
    raise typer.Exit(status)


def note(text: str) -> None:
    """A line for the reader on stderr, so that stdout stays the answer."""
    print(text, file=sys.stderr, flush=True)


def emit(value: dict[str, Any]) -> None:
    """The one JSON object of --json."""
    print(as_json(value), flush=True)


def as_json(value: dict[str, Any]) -> str:
    """A result for people and programs; numbers without bounds become null."""
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def bar(what: str, *, quiet: bool = False) -> Iterator[Callable[..., None]]:
    """Progress with ETA on stderr: call the yielded function with (done, total, what now).

    A terminal gets a bar, a log a line now and then; ``quiet`` nothing.
    """
    console = Console(stderr=True)
    if quiet:
        yield lambda done, total, now="": None
        return
    if not console.is_terminal:
        yield _lines(what)
        return
    columns = (
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=None)

        def update(done: int, total: int, now: str = "") -> None:
            progress.update(task, completed=done, total=total, description=now or what)

        yield update


def _lines(what: str) -> Callable[..., None]:
    start = time.monotonic()
    shown = start

    def update(done: int, total: int, now: str = "") -> None:
        nonlocal shown
        at = time.monotonic()
        if at - shown < LINE_SECONDS:
            return
        shown = at
        eta = f", ETA {duration((at - start) * (total - done) / done)}" if done else ""
        note(f"{what} {done}/{total}{eta}" + (f": {now}" if now else ""))

    return update


def duration(seconds: float) -> str:
    """Like 0:42 or 1:05:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def size(count: float) -> str:
    """Bytes for a reader."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} bytes"
