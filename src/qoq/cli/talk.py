"""A line from the terminal, an answer to it as it grows; what Ctrl-C means at either."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qoq.cli.terminal import note

if TYPE_CHECKING:
    from qoq.client.answers import Piece


@dataclass
class Said:
    """An answer, whole or as far as it came; finish_reason is "abort" for one that was stopped."""

    text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    tokens: int | None = None


def typed(prompt: str = "> ") -> str | None:
    """The next line; None when the input ends. At a terminal Ctrl-C only drops what was typed."""
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() its line editing and history)
    while True:
        try:
            return input(prompt if at_terminal else "")
        except EOFError:
            if at_terminal:
                print()
            return None
        except KeyboardInterrupt:
            if not at_terminal:
                raise
            print()
            note("Ctrl-D leaves.")


def say(pieces: "Iterator[Piece]", *, quiet: bool = False, end: str = "\n") -> Said:
    """Print an answer as it grows. Ctrl-C at a terminal stops it and keeps what there is."""
    said = Said()
    try:
        for piece in pieces:
            if not quiet:
                print(piece.text, end="", flush=True)
            said.text += piece.text
            said.finish_reason = piece.finish_reason or said.finish_reason
            said.prompt_tokens = piece.prompt_tokens or said.prompt_tokens
            said.tokens = piece.completion_tokens or said.tokens
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        said.finish_reason = "abort"
        close = getattr(pieces, "close", None)  # hangs up, or stops the engine
        if close is not None:
            close()
    if not quiet:
        print(end=end, flush=True)
    return said
