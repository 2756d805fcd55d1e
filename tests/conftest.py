"""What every test shares: no network, no flaky deadlines."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that would download fails instead

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # Read when a kernel is defined: without a GPU the Triton twins' tests check numbers on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("qoq", deadline=None)
settings.load_profile("qoq")


@pytest.fixture
def three_torch_threads() -> Iterator[None]:
    """Torch runs on three threads during a test."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)
