"""The C++ extension, and the one Backend (instruction set and threads) that all CPU twins share."""

import functools
import importlib
import math
import os
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qoq.errors import BackendUnavailable

CPU = torch.device("cpu")


def unsupported(device: torch.device) -> str | None:
    """Why no C++ twin can run on ``device``, or None: the part of the answer that all share."""
    return missing() if device.type == "cpu" else "it runs on the CPU only"


@functools.cache
def missing() -> str | None:
    """Why there is no extension, or None."""
    try:
        extension()
    except ImportError as error:
        return f"the C++ extension is not built; reinstall with pip install . ({error})"
    return None


@functools.cache
def extension() -> Any:
    """qoq._C, imported when first asked for."""
    return importlib.import_module("qoq._C")


class _Shared:
    """The one Backend of this process, made once whoever asks first."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.backend: Any = None

    def forget(self) -> None:
        with self.lock:
            self.backend = None


_shared = _Shared()


def backend() -> Any:
    """The shared ``_C.Backend``: QOQ_ISA or the best instruction set, QOQ_NUM_THREADS or all CPUs.

    Made by the first op that runs. Worker threads do not survive a fork, so a child makes its own.
    """
    made = _shared.backend
    if made is not None:
        return made
    with _shared.lock:
        if _shared.backend is None:
            _shared.backend = _make()
        return _shared.backend


def _make() -> Any:
    try:
        return extension().Backend(os.environ.get("QOQ_ISA", ""), thread_count())
    except ValueError as error:
        raise BackendUnavailable(str(error)) from None
    except RuntimeError as error:
        raise BackendUnavailable(
            f"The system does not grant {thread_count()} threads ({error}); set QOQ_NUM_THREADS "
            "to fewer."
        ) from None


def forget() -> None:
    """Let the next op make a new Backend, from QOQ_ISA and QOQ_NUM_THREADS as they are then."""
    _shared.forget()


def _after_fork() -> None:
    _shared.lock = threading.Lock()  # another thread of the parent may have held it
    _shared.backend = None


os.register_at_fork(after_in_child=_after_fork)


def set_threads(threads: int) -> None:
    """Run all C++ twins on this many threads from now on, in processes started later too."""
    with _shared.lock:
        os.environ["QOQ_NUM_THREADS"] = str(_positive(str(threads)))
        _shared.backend = None


def thread_count() -> int:
    """Threads a new backend gets."""
    wanted = os.environ.get("QOQ_NUM_THREADS", "")
    return _positive(wanted) if wanted else available_cpus()


def _positive(wanted: str) -> int:
    if not wanted.isdecimal() or int(wanted) < 1:
        raise BackendUnavailable(f"QOQ_NUM_THREADS must be a number from 1 on, not {wanted!r}")
    return int(wanted)


def available_cpus() -> int:
    """CPUs this process may use: those of its affinity, or what its cgroups grant if that is less.

    A part of a CPU counts as none: threads beyond the quota are stopped in turn, and every op waits
    for its last thread.
    """
    try:
        cpus = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cpus = os.cpu_count() or 1
    return max(1, int(min(cpus, cpu_quota())))


def cpu_quota(
    mounts: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> float:
    """CPUs' worth of time that cgroups (v2 or v1) grant this process; inf where none sets a limit.

    A limit of any group above one's own counts too.
    """
    quota = math.inf
    for line in _read(membership).splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = mounts / controllers
        # Inside a container the group's path may be the host's: its root is then all we see.
        own = mount / group.strip("/")
        for folder in (own, *own.parents):
            if controllers:
                limit = [_read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
            else:
                limit = _read(folder / "cpu.max").split()
            if all(x.strip().isdecimal() for x in limit) and len(limit) == 2:
                quota = min(quota, int(limit[0]) / int(limit[1]))
            if folder == mount:
                break
    return quota


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def rows(x: Tensor) -> Tensor:
    """x [..., K] as the kernels read it, fp32 with no gaps inside rows; x itself if it is so."""
    if x.dtype is not torch.float32:
        x = x.to(torch.float32)
    return x if x.stride(-1) == 1 else x.contiguous()


def address(x: Tensor, dtype: torch.dtype, *shape: int) -> int:
    """Where the data of x lies: the extension believes what is checked here.

    x must be on the CPU, of this dtype and shape, and contiguous.
    """
    if not x.is_cpu or x.dtype is not dtype or x.shape != shape or not x.is_contiguous():
        raise ValueError(
            f"need a contiguous CPU tensor {dtype} {list(shape)}, "
            f"not {x.dtype} {list(x.shape)} on {x.device} with strides {x.stride()}"
        )
    return x.data_ptr()


def row_address(x: Tensor, *shape: int) -> int:
    """As ``address``, for the fp32 rows of a wider matrix: gaps between rows, none within."""
    gapless = x.stride(-1) == 1 or shape[-1] == 1
    if not x.is_cpu or x.dtype is not torch.float32 or x.shape != shape or not gapless:
        raise ValueError(
            f"need fp32 rows {list(shape)} on the CPU, "
            f"not {x.dtype} {list(x.shape)} on {x.device} with strides {x.stride()}"
        )
    return x.data_ptr()
