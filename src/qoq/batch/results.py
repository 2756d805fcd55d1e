"""The result file: a line for every request, resumable, and whole when it appears.

Lines go to ``OUT.partial`` as they are finished; when all are there it is renamed to OUT.
"""

import fcntl
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qoq.errors import SourceError


class Results:
    """Appends lines and knows which were there before. Use it in a ``with`` block."""

    def __init__(self, out: Path, *, overwrite: bool = False) -> None:
        """Take up what an earlier run left in ``out`` or beside it, or with ``overwrite`` nothing.

        A last line that was only half written is cut off. Raises SourceError where the file is no
        result of a batch, or another run is writing it.
        """
        self.out = out
        self.partial = out.with_name(f"{out.name}.partial")
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.exists() and not self.partial.exists() and not overwrite:
            copy = out.with_name(f"{out.name}.copy")  # a half-made copy must not look like a start
            shutil.copyfile(out, copy)
            os.replace(copy, self.partial)
        self._file = self.partial.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise SourceError(
                f"Another run is writing {self.partial}; wait for it, or name another output."
            ) from error
        try:
            if overwrite:
                self._file.truncate(0)
            lines = self._take_up()
        except SourceError:
            self._file.close()
            raise
        self._ids = {line.get("id") for line in lines}
        # A malformed line may carry the custom_id of a sound one; it does not answer for that.
        self._custom_ids = {line["custom_id"] for line in lines if line["response"] is not None}
        self.resumed = len(lines)
        self.failed = sum(is_failure(line) for line in lines)

    def has(self, own_id: str, custom_id: str | None = None) -> bool:
        """Whether an earlier run finished the line of this id, or the client's id."""
        return own_id in self._ids or custom_id in self._custom_ids

    def write(self, line: dict[str, Any]) -> None:
        """Append a line; after this no interrupt of this program loses it."""
        data = json.dumps(line, ensure_ascii=True, allow_nan=False).encode() + b"\n"
        self._file.write(data)
        self._file.flush()
        self.failed += is_failure(line)

    def publish(self) -> None:
        """All lines are there: give the file its name."""
        os.fsync(self._file.fileno())
        os.replace(self.partial, self.out)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def _take_up(self) -> list[dict[str, Any]]:
        """The lines there are; what follows the last line's end is dropped."""
        self._file.seek(0)
        raw = self._file.read()
        whole = raw[: raw.rfind(b"\n") + 1]
        lines = []
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            if not isinstance(value, dict) or not {"id", "custom_id", "response"} <= value.keys():
                raise SourceError(
                    f"Line {number} of {self.partial} is no result of a batch; name another "
                    "output, or replace this one with --overwrite."
                )
            lines.append(value)
        self._file.truncate(len(whole))  # only now that the file is known to be ours
        self._file.seek(0, os.SEEK_END)
        return lines


def is_failure(line: dict[str, Any]) -> bool:
    """Whether a result says anything but 200."""
    response = line.get("response")
    return not isinstance(response, dict) or response.get("status_code") != 200
