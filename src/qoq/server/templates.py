"""Chat templates in a process of their own, so that one that loops or explodes can be killed.

A template is a program that came with the model. The sandbox keeps it from files and from our
objects, not from ``9**9**9`` or nested loops, which no thread can be stopped in. So a child process
renders it: a rendering that takes longer than the limit is refused, the child killed, and the next
conversation gets a fresh one. The child's memory is limited too, where the system can do that.
"""

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from qoq.errors import RequestError
from qoq.tokenizer import ChatTemplate

_START_S = 120.0  # the child imports what renders templates; slow on a busy machine


class TemplateProcess:
    """Renders conversations; ``render`` may be called from any thread."""

    def __init__(self, *, time_limit: float) -> None:
        """``time_limit`` in seconds is for one rendering; the child's start does not count."""
        self._time_limit = time_limit
        self._lock = threading.Lock()  # one rendering at a time; they take well under a millisecond
        self._child: subprocess.Popen[bytes] | None = None

    def render(
        self, template: ChatTemplate, messages: Sequence[Mapping[str, Any]], **options: Any
    ) -> str:
        """The prompt of a conversation; ``options`` are those of ``ChatTemplate.render``.

        Raises RequestError where the template refuses the messages or is cut off.
        """
        line = {"template": template.to_json(), "messages": list(messages), "options": options}
        try:
            asked = json.dumps(line).encode() + b"\n"
        except RecursionError:
            raise RequestError("The conversation is nested too deeply; make it flatter.") from None
        with self._lock:
            child = self._running()
            answer = self._ask(child, asked, self._time_limit)
        if answer is None:
            raise RequestError(
                f"The chat template took longer than {self._time_limit:g} s or too much memory and "
                "was cut off. Send fewer messages, or serve the model with another --chat-template."
            )
        if "error" in answer:
            raise RequestError(str(answer["error"]))
        return str(answer["text"])

    def start(self) -> None:
        """Have the child ready before the first conversation."""
        with self._lock:
            self._running()

    def close(self) -> None:
        """End the child."""
        with self._lock:
            self._stop()

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._child is not None and self._child.poll() is None:
            return self._child
        self._stop()
        self._child = subprocess.Popen(
            [sys.executable, "-m", "qoq.server.template_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        if self._ask(self._child, b"", _START_S) != {"text": "ready"}:
            raise RequestError("The process that renders chat templates does not start.")
        return self._child

    def _ask(
        self, child: "subprocess.Popen[bytes]", line: bytes, seconds: float
    ) -> dict[str, Any] | None:
        """One line there, one line back; None where the child was killed or died."""
        assert child.stdin is not None
        assert child.stdout is not None
        killer = threading.Timer(seconds, child.kill)
        killer.start()
        try:
            child.stdin.write(line)
            child.stdin.flush()
            answer = json.loads(child.stdout.readline())
        except (OSError, ValueError):  # the pipe broke, or ended within the line
            self._stop()
            return None
        finally:
            killer.cancel()
        return answer if isinstance(answer, dict) else None

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was still to be written: nobody reads it
                    pipe.close()
