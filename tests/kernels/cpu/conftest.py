"""Every CPU test runs on every instruction set this machine has, with one thread and with two."""

import os
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch

from qoq.kernels.cpu import backend

MISSING = backend.missing()
ISAS = [] if MISSING else [*backend.extension().usable_isas(), "tiles"]
if os.environ.get("QOQ_TEST_AMX") == "only":  # make emulate-amx
    ISAS = ["amx"]


@pytest.fixture(
    scope="module", params=[(isa, n) for isa in ISAS for n in (1, 2)] or [("", 1)], ids=str
)
def variant(request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    """(instruction set, threads) that the twins use during a test."""
    if MISSING:
        pytest.skip(MISSING)
    isa, threads = request.param
    with patch.dict(os.environ, {"QOQ_ISA": isa, "QOQ_NUM_THREADS": str(threads)}):
        backend.forget()
        yield isa, threads
    backend.forget()


@pytest.fixture(autouse=True, scope="module")
def _poisoned_memory() -> Iterator[None]:
    """torch.empty yields NaN and the largest integers: what a kernel forgets to write is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
