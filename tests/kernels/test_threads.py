"""Torch's threads stand aside, and come back whatever happens."""

import pytest
import torch

from qoq.kernels.threads import torch_stands_aside

pytestmark = pytest.mark.usefixtures("three_torch_threads")


def test_torch_has_one_thread_inside_and_its_own_again_after() -> None:
    with torch_stands_aside():
        assert torch.get_num_threads() == 1
        with torch_stands_aside():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3


def test_it_can_be_told_not_to() -> None:
    with torch_stands_aside(False):
        assert torch.get_num_threads() == 3


def test_an_error_gives_them_back() -> None:
    with pytest.raises(KeyError), torch_stands_aside():
        raise KeyError
    assert torch.get_num_threads() == 3
