"""The device a model runs on: the one asked for, or the best there is, and why."""

import re
from dataclasses import dataclass

import torch

from qoq.errors import BackendUnavailable
from qoq.kernels.gpu.backend import missing, too_old


@dataclass(frozen=True)
class Choice:
    """A device, and why it was chosen: a phrase."""

    device: torch.device
    why: str

    def __str__(self) -> str:
        return f"{self.device} ({self.why})"


def choose_device(wanted: str = "auto", backend: str = "auto") -> Choice:
    """``cpu``, ``cuda`` or ``cuda:N`` as asked for; ``auto``: a GPU if our kernels run there, and
    ``backend`` is not that of the CPU.

    A GPU becomes the calling thread's current one. Raises BackendUnavailable for other names and
    for GPUs that torch does not see.
    """
    if wanted == "cpu":
        return Choice(torch.device("cpu"), "asked for")
    if wanted == "auto":
        asked = "the backend asked for is the CPU's" if backend == "cpu" else None
        reason = asked or _no_gpu(0) or missing() or too_old(0)
        if reason is not None:
            return Choice(torch.device("cpu"), reason)
        return _gpu(0)
    named = re.fullmatch(r"cuda(?::(\d+))?", wanted)
    if named is None:
        raise BackendUnavailable(f"There is no device {wanted!r}; use auto, cpu, cuda or cuda:N.")
    index = int(named[1] or 0)
    reason = _no_gpu(index)
    if reason is not None:
        raise BackendUnavailable(f"Device {wanted!r} cannot be used here: {reason}.")
    return _gpu(index)


def _no_gpu(index: int) -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    if index >= torch.cuda.device_count():
        return f"torch sees {torch.cuda.device_count()} CUDA GPUs"
    return None


def _gpu(index: int) -> Choice:
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return Choice(device, torch.cuda.get_device_name(device))
