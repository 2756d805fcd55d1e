"""The roof: byte products and bytes read per second, measured in the run they are compared with."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from qoq.kernels.cpu.backend import backend, extension

_BUFFER = 512 << 20  # bytes: far beyond any cache
_ROUNDS = 2_000_000


@dataclass(frozen=True)
class Roof:
    """``int8_peak_ops``: int8 multiply and add operations a second (two per product);
    ``read_bandwidth``: bytes a second from memory. All threads together.
    """

    int8_peak_ops: float
    read_bandwidth: float

    def seconds(self, ops: float, read_bytes: float) -> float:
        """The least time for this many operations and bytes, whichever takes longer."""
        return max(ops / self.int8_peak_ops, read_bytes / self.read_bandwidth)


def measure_roof(repeats: int = 5) -> Roof:
    """Measure this machine with the instruction set and threads that the kernels use."""
    native, shared = extension(), backend()
    memory = torch.empty(_BUFFER, dtype=torch.uint8).fill_(1)
    products = 0

    def spin() -> None:
        nonlocal products
        products = native.spin_products(shared, _ROUNDS)

    spin_seconds = min(timed(spin, repeats))
    read_seconds = statistics.median(
        timed(lambda: native.read_all(shared, memory.data_ptr(), _BUFFER), repeats)
    )
    return Roof(2 * products / spin_seconds, _BUFFER / read_seconds)


def timed(run: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each of ``repeats`` runs, after one that does not count."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds
