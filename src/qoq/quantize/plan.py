"""What a quantization will need in memory, disk and time, said (and refused) before it starts."""

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from qoq.checkpoint.partial import SUFFIX
from qoq.errors import ResourceError
from qoq.formats.scheme import QuantScheme
from qoq.kvcache.budget import memory_at_hand
from qoq.models.anatomy import EMBED, LM_HEAD, layer_linears, packed_tensors
from qoq.models.config import ModelConfig
from qoq.quantize.recipe import Recipe
from qoq.quantize.replay import CHUNK_TOKENS

_LIBRARIES = 1.1e9  # bytes: interpreter, torch and its allocator's slack
_HALVES = (EMBED, f"{LM_HEAD}.weight")
_CGROUP = Path("/sys/fs/cgroup")
_PROBE = 768  # side of the matrix product that measures this machine


@dataclass(frozen=True)
class Plan:
    """Estimates: peak memory and disk in bytes, time in seconds."""

    memory: float
    disk_work: float
    disk_out: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"about {self.memory / 1e9:.1f} GB of memory, {self.disk_out / 1e9:.2f} GB of disk for "
            f"the result and {self.disk_work / 1e9:.2f} GB meanwhile, {_duration(self.seconds)}"
        )


def make_plan(
    config: ModelConfig, scheme: QuantScheme, recipe: Recipe, tokens: int, device: torch.device
) -> Plan:
    """Estimate a job of ``tokens`` calibration tokens (0: the recipe needs none)."""
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_layers
    streams = (2 if recipe.compensate else 1) if tokens else 0
    linears = layer_linears(config)
    weights = sum(spec.out_features * spec.in_features for spec in linears)
    widest = max(spec.in_features for spec in linears)
    largest = max(spec.out_features * spec.in_features for spec in linears)
    embedding = config.vocab_size * hidden
    # Float block, packed block; moments and their factors of the widest linear; grid and work.
    block = 4 * (2 * weights) + (4 * (6 * widest**2) if tokens else 0) + 4 * 7 * largest
    # Rows of one chunk at the widest point of the MLP; embedding or head in their stored size.
    chunk = 4 * CHUNK_TOKENS * (8 * inner + 16 * hidden)
    ends = 4 * embedding + 4 * 16 * 4096 * hidden
    rows = 4.0 * tokens * (4 * hidden + config.q_size) * streams
    # Floats are fp16 at the two ends, fp32 within layers.
    out = sum(
        _size(shape) * (dtype.itemsize if dtype else 2 if name in _HALVES else 4)
        for name, (shape, dtype) in packed_tensors(config, scheme, recipe.center_keys).items()
    )
    replays = 2.6 * streams + (1.6 if tokens else 0)
    squares = sum({s.input: s.in_features**2 for s in linears}.values())
    flops = layers * 2 * tokens * (replays * weights + 1.5 * streams * squares)
    if tokens:
        # Factors of the moments, and what rounding spreads from column to column.
        flops += layers * sum(3.0 * s.in_features**3 for s in linears)
        per_weight = (4 if recipe.compensate else 0) + recipe.gptq + 3 * recipe.refine_sweeps
        flops += layers * sum(per_weight * s.out_features * s.in_features**2 for s in linears)
    # Rounding walks columns: about 12 cheap operations per weight and sweep.
    flops += layers * weights * 12 * (2 + recipe.refine_sweeps) * (4 if recipe.gptq else 1)
    seconds = 1.3 * flops / _flops_per_second(device) + embedding / 4e7
    return Plan(max(block + chunk, ends) + _LIBRARIES, rows, out, seconds)


def check_plan(plan: Plan, out: Path, device: torch.device) -> None:
    """Raise ResourceError if memory or disk at hand cannot hold the job."""
    available = _memory_at_hand()
    if device.type == "cpu" and plan.memory > available:
        raise ResourceError(
            f"This needs about {plan.memory / 1e9:.1f} GB of memory; {available / 1e9:.1f} GB are "
            "free. Close other programs or use a machine with more memory."
        )
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    need = plan.disk_out + plan.disk_work - _written(out)
    if need > free:
        raise ResourceError(
            f"This needs about {need / 1e9:.2f} GB of disk under {parent}; {free / 1e9:.2f} GB are "
            "free. Free some space, choose another output folder, or lower --samples."
        )


def _memory_at_hand() -> float:
    """Bytes this process may still take."""
    return float(memory_at_hand(cgroup=_CGROUP))


def _written(out: Path) -> int:
    """Bytes an interrupted run left, which a resumed one will not need again."""
    partial = out.absolute().parent / (out.name + SUFFIX)
    return sum(f.stat().st_size for f in partial.iterdir()) if partial.is_dir() else 0


def _flops_per_second(device: torch.device) -> float:
    a = torch.randn(_PROBE, _PROBE, device=device)
    a @ a
    start = time.perf_counter()
    for _ in range(3):
        a = (a @ a).clamp_(-1, 1)
    float(a[0, 0])  # wait for the device
    return 3 * 2 * _PROBE**3 / max(time.perf_counter() - start, 1e-9)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"about {max(1, round(seconds))} s on {os.cpu_count()} cores"
    if seconds < 5400:
        return f"about {round(seconds / 60)} min"
    return f"about {seconds / 3600:.1f} h"
