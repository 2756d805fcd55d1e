"""Numbers of the twins come from a GPU or Triton's interpreter, machine code from a compiler."""

import pytest

from helpers.triton_code import Compiler


@pytest.fixture(scope="session")
def compiler(request: pytest.FixtureRequest) -> Compiler:
    """Compiles kernels for GPUs that need not be here; Triton's cache outlives the session."""
    return Compiler(request.config.cache.mkdir("triton"))
