"""What all Triton twins share: whether they can run here."""

import functools
import importlib

import torch

OLDEST = (8, 0)  # int8 tensor cores fed by asynchronous copies


def unsupported(device: torch.device) -> str | None:
    """Why no Triton twin can run on ``device``, or None: the part of the answer that all share."""
    if device.type != "cuda":
        return "it runs on CUDA GPUs only"
    return missing() or too_old(device.index or 0)


@functools.cache
def missing() -> str | None:
    """Why there is no Triton, or None."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton is missing; install it with pip install 'qoq[gpu]' ({error})"
    return None


@functools.cache
def too_old(index: int) -> str | None:
    """Why GPU number ``index`` cannot run the kernels, or None."""
    have = torch.cuda.get_device_capability(index)
    if have >= OLDEST:
        return None
    return f"compute capability {have[0]}.{have[1]} is below {OLDEST[0]}.{OLDEST[1]}"
