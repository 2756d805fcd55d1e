"""The parts of the check on the CPU, tiny: Triton's kernels by its interpreter, time by a clock
that takes none.
"""

from collections.abc import Sequence

import pytest
import torch

from qoq.bench.gpu.bench import Bench, Ceilings
from qoq.bench.gpu.clock import Run
from qoq.kernels.gpu.backend import missing


def instant(runs: Sequence[Run]) -> list[float | str]:
    """Calls each run twice; the first takes 1 us, the next 2, ..."""
    times: list[float | str] = []
    for at, run in enumerate(runs, 1):
        try:
            run.call()
            run.call()
            times.append(at * 1e-6)
        except Exception as error:
            times.append(f"{type(error).__name__}: {error}")
    return times


@pytest.fixture
def bench() -> Bench:
    """Ours by the oracle."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    ceilings = Ceilings(read=1e12, int8=1e15, bf16=1e15)
    return Bench(torch.device("cpu"), instant, "oracle", ceilings, cold_bytes=1)
