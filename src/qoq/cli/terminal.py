"""What every verb shares: errors as one sentence, JSON alone on stdout, bars on stderr."""

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec

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


def fail(sentence: str, status: int = 1) -> None:
    """Print one sentence to stderr and leave with ``status``."""
    note(f"qoq: {sentence}")
    raise typer.Exit(status)


def note(text: str) -> None:
    """A line for the reader on stderr, so that stdout stays the answer."""
    print(text, file=sys.stderr, flush=True)


def emit(value: dict[str, Any]) -> None:
    """The one JSON object of --json."""
    print(json.dumps(value, indent=2, allow_nan=False), flush=True)


@contextmanager
def bar(what: str, *, quiet: bool = False) -> Iterator[Callable[..., None]]:
    """A progress bar with ETA on stderr; call the yielded function with (done, total, what now)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, disable=quiet or not console.is_terminal, console=console) as progress:
        task = progress.add_task(what, total=None)

        def update(done: int, total: int, now: str = "") -> None:
            progress.update(task, completed=done, total=total, description=now or what)

        yield update


def finite(value: float | None) -> float | None:
    """JSON knows no infinity: null instead."""
    return value if value is None or abs(value) < float("inf") else None
