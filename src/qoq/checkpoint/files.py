"""Files that are safe to read and whole when they appear: names, symlinks, fsync, full disks."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from qoq.errors import (
    CheckpointError,
    CheckpointIncompleteError,
    CheckpointPathError,
    ResourceError,
)

JSON_LIMIT = 64 << 20  # bytes; a config or index beyond this is no config or index
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_plain_name(name: object) -> bool:
    """Whether ``name`` can only be a file directly in the folder it is looked up in."""
    if not isinstance(name, str) or not name.isprintable() or len(name.encode()) > 255:
        return False
    return name not in ("", ".", "..") and not set(name) & set("/\\:")


def member(folder: Path, name: object, source: str) -> Path:
    """``folder/name``, proven to be a regular file that lies in ``folder``.

    ``source`` says in errors who named it. Raises CheckpointPathError for names and symlinks that
    lead elsewhere, CheckpointIncompleteError if there is no such file.
    """
    if not is_plain_name(name):
        raise CheckpointPathError(
            f"{source} names the file {name!r}; it must be a plain file name within {folder}."
        )
    path = folder / str(name)
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if real.parent != home and not _is_hub_blob(real, home):
        raise CheckpointPathError(
            f"{path} is a symlink to {real}, outside its folder. Copy the file in if you trust it."
        )
    if not real.is_file():
        raise CheckpointIncompleteError(
            f"{folder} has no file {name}, which {source} names. Copy or download it again."
        )
    return path


def _is_hub_blob(real: Path, home: Path) -> bool:
    """The hub client's cache keeps ``snapshots/<revision>/name -> ../../blobs/<hash>``."""
    return home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs"


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a checkpoint's file; a key given twice is refused, not overridden."""
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes: no sane JSON file.")
        value = parse_json(path.read_bytes())
    except OSError as error:
        raise CheckpointIncompleteError(f"{path} cannot be read ({error}).") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: no valid JSON ({error}).") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(value).__name__}.")
    return value


def parse_json(data: bytes) -> Any:
    """JSON in UTF-8 without duplicate keys. Raises ValueError or RecursionError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise ValueError(f"key {key!r} is given twice")
            seen[key] = value
        return seen

    return json.loads(data.decode("utf-8"), object_pairs_hook=unique)


def dump_json(value: dict[str, Any]) -> bytes:
    """Canonical JSON: sorted keys, two spaces, a final newline, so equal data is equal bytes."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8")


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a failing write into an error that says what to do; a full disk is a ResourceError."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise ResourceError(
                f"The disk that holds {folder} is full ({error.strerror}). Free space or choose "
                "another folder, then run again; what is finished is kept in the partial folder."
            ) from error
        raise CheckpointError(f"Writing in {folder} failed: {error}.") from error


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under ``path`` whole and flushed to disk, or not at all."""
    tmp = path.with_name(path.name + ".tmp")
    with disk_errors(path.parent):
        try:
            with open(tmp, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(tmp, path)
            sync_folder(path.parent)
        except BaseException:
            tmp.unlink(missing_ok=True)
            raise


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename in it survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
