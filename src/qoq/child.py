"""Child: a process that answers every line of JSON with one, and that can be killed.

What others wrote (chat templates, grammars) may loop or eat memory, and no thread can be stopped in
that. A process can.
"""

import contextlib
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from qoq.errors import ResourceError

_START_S = 120.0  # the child imports what it works with; slow on a busy machine


class Child:
    """Asks one question at a time, from any thread; a child that died is replaced at the next."""

    def __init__(self, module: str, hello: Callable[[], Mapping[str, Any]]) -> None:
        """``python -m module`` is sent ``hello()`` and answers ``{"ready": true}``."""
        self._module = module
        self._hello = hello
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stop: Callable[[], object] = lambda: None

    def ask(self, question: Mapping[str, Any], seconds: float) -> dict[str, Any] | None:
        """The answer; None where the child died or was killed after ``seconds``.

        Its start does not count. Raises ResourceError where it does not start.
        """
        line = json.dumps(question).encode()
        with self._lock:
            return self._ask(self._running(), line, seconds)

    def start(self) -> None:
        """Have the child ready before the first question."""
        with self._lock:
            self._running()

    def close(self) -> None:
        """End the child, whatever it does."""
        with self._lock:
            self._stop()

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._stop()
        self._process = subprocess.Popen(
            [sys.executable, "-m", self._module], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._stop = weakref.finalize(self, _end, self._process)  # at the latest with this object
        hello = json.dumps(self._hello()).encode()
        if self._ask(self._process, hello, _START_S) != {"ready": True}:
            raise ResourceError(
                f"The process {self._module} does not start; standard error says why."
            )
        return self._process

    def _ask(
        self, process: "subprocess.Popen[bytes]", line: bytes, seconds: float
    ) -> dict[str, Any] | None:
        assert process.stdin is not None
        assert process.stdout is not None
        killer = threading.Timer(seconds, process.kill)
        killer.start()
        try:
            process.stdin.write(line + b"\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
        except (OSError, ValueError):  # the pipe broke, or ended within the line
            self._stop()
            return None
        finally:
            killer.cancel()
        return answer if isinstance(answer, dict) else None


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what was still to be written: nobody reads it
                pipe.close()
