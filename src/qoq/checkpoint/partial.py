"""PartialFolder: an output folder under construction that becomes OUT by one rename."""

import ctypes
import os
import shutil
from collections.abc import Collection
from pathlib import Path

from qoq.checkpoint.files import disk_errors, sync_folder
from qoq.errors import CheckpointError

SUFFIX = ".partial"
_MARKER = ".unfinished"  # proves that the partial folder is ours to empty
_CONFIG = "config.json"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def check_out(out: str | Path, *, overwrite: bool = False) -> None:
    """Raise CheckpointError if a checkpoint may not be written to the folder ``out``."""
    path = Path(os.path.abspath(out))
    if not path.name:
        raise CheckpointError(f"{out} cannot be an output folder; name a new one.")
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir():
        raise CheckpointError(f"{path} is no folder; choose another output folder.")
    if not any(path.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(
            f"{path} exists already. Choose another output folder, or replace it with --overwrite."
        )
    if not (path / _CONFIG).is_file():
        raise CheckpointError(
            f"{path} holds no {_CONFIG}, so it is no model folder and is not overwritten."
        )


class PartialFolder:
    """``OUT.partial``; nothing is called OUT before ``publish``.

    An OUT that exists (and is not empty) is refused unless ``overwrite``, and then only if it is
    a model folder (it holds a config.json). ``resume`` keeps what an interrupted run left in the
    partial folder, else it is emptied first. Raises CheckpointError, ResourceError.
    """

    def __init__(self, out: str | Path, *, overwrite: bool = False, resume: bool = False) -> None:
        self.out = Path(os.path.abspath(out))
        self.path = self.out.with_name(self.out.name + SUFFIX)
        self.overwrite = overwrite
        check_out(out, overwrite=overwrite)
        with disk_errors(self.out.parent):
            self._prepare(resume)

    def _prepare(self, resume: bool) -> None:
        if os.path.lexists(self.path):
            if self.path.is_symlink() or not self.path.is_dir():
                raise CheckpointError(f"{self.path} is in the way; remove it.")
            ours = (self.path / _MARKER).is_file() or not any(self.path.iterdir())
            if not ours:
                raise CheckpointError(
                    f"{self.path} is no unfinished output of this program; move it out of the way."
                )
            if not resume:
                shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / _MARKER).touch()
        for leftover in self.path.glob("*.tmp"):
            leftover.unlink()

    def publish(self, keep: Collection[str]) -> Path:
        """Drop every entry but ``keep`` and rename the folder to OUT. Returns OUT."""
        with disk_errors(self.out.parent):
            for entry in sorted(self.path.iterdir()):
                if entry.name not in keep:
                    if entry.is_dir() and not entry.is_symlink():
                        shutil.rmtree(entry)
                    else:
                        entry.unlink()
            sync_folder(self.path)
            check_out(self.out, overwrite=self.overwrite)  # another process may have made it since
            if self.out.is_dir() and any(self.out.iterdir()):
                self._swap()
            else:
                os.rename(self.path, self.out)  # an empty OUT is replaced
            sync_folder(self.out.parent)
        return self.out

    def _swap(self) -> None:
        """Exchange the new folder with the old one, then delete the old one."""
        if not _exchange(self.path, self.out):
            # No atomic exchange on this system: OUT is missing for a moment, never half-written.
            old = self.path.with_name(self.path.name + ".old")
            os.rename(self.out, old)
            os.rename(self.path, self.out)
            os.rename(old, self.path)
        shutil.rmtree(self.path)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two paths in one step (Linux renameat2); False where the system cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    code: int = call(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)
    return code == 0
