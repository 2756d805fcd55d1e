"""env: the GPU, its driver and the libraries that run on it."""

import platform
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from qoq.bench.gpu.bench import Bench, Row
from qoq.kernels.dispatch import describe

_ASKED = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
_PACKAGES = ("torch", "triton", "numpy", "transformers", "safetensors", "qoq")


def rows(bench: Bench) -> Iterator[Row]:
    """Facts by name; what runs each op."""
    yield {"fact": "python", "value": platform.python_version()}
    for package in _PACKAGES:
        try:
            yield {"fact": package, "value": version(package)}
        except PackageNotFoundError:
            yield {"fact": package, "value": None}
    yield {"fact": "cuda", "value": torch.version.cuda}
    if bench.device.type == "cuda":
        has = torch.cuda.get_device_properties(bench.device)
        yield {"fact": "gpu", "value": has.name}
        yield {"fact": "capability", "value": f"{has.major}.{has.minor}"}
        yield {"fact": "multiprocessors", "value": has.multi_processor_count}
        yield {"fact": "memory_bytes", "value": has.total_memory}
        yield {"fact": "l2_bytes", "value": has.L2_cache_size}
        yield from _nvidia_smi()
    for op, what in describe(bench.device):
        yield {"fact": f"op {op}", "value": what}


def lines(rows: list[Row]) -> list[str]:
    """For people."""
    return [f"{row['fact']:18} {row['value']}" for row in rows]


def _nvidia_smi() -> Iterator[Row]:
    command = ["nvidia-smi", f"--query-gpu={_ASKED}", "--format=csv,noheader", "--id=0"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return
    for name, value in zip(_ASKED.split(","), told.stdout.strip().split(","), strict=False):
        yield {"fact": f"nvidia-smi {name}", "value": value.strip()}
