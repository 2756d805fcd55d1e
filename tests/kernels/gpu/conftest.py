"""Numbers of the twins come from a GPU or Triton's interpreter, machine code from a compiler."""

import os
from collections.abc import Iterator

import pytest
import torch

from helpers.triton_code import Compiler
from helpers.triton_interpreter import faithful_interpreter
from qoq.kernels.gpu.backend import missing

CUDA = torch.cuda.is_available()  # as tests/conftest.py asks before it turns the interpreter on


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where a test puts its tensors; what it compares may be brought back with ``.cpu()``."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    return torch.device("cuda", 0) if CUDA else torch.device("cpu")


@pytest.fixture(scope="session")
def cuda(device: torch.device) -> torch.device:
    """``device``, for what the interpreter cannot show; skips where there is no GPU."""
    if device.type != "cuda":
        pytest.skip("needs a CUDA GPU")
    return device


@pytest.fixture(scope="session")
def compiler(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiler:
    """Compiles kernels for GPUs that need not be here; Triton's cache outlives the session."""
    if "QOQ_NO_MACHINE_CODE" in os.environ:  # qoq gpu-check, whose time is short
        pytest.skip("QOQ_NO_MACHINE_CODE is set")
    cache = getattr(request.config, "cache", None)  # pytest's, which may be switched off
    return Compiler(cache.mkdir("triton") if cache else tmp_path_factory.mktemp("triton"))


@pytest.fixture(autouse=True, scope="module")
def _poisoned_memory() -> Iterator[None]:
    """torch.empty yields NaN and the largest integers: what a kernel forgets to write is seen.

    ``warn_only``: torch's own GPU ops that order their additions freely may stay as they are.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def faithful() -> Iterator[None]:
    """The interpreter, where it stands in for a GPU, computes as one does."""
    with faithful_interpreter():
        yield
