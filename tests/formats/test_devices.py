"""Codes and scales have the same bits on every device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qoq.formats.activation import quantize_per_token
from qoq.formats.affine import affine_quantize
from qoq.formats.progressive import channel_scales, group_codes, group_qparams

META = torch.device("meta")


class Divisors(TorchDispatchMode):
    """Fails where a tensor is divided by a number, which on a GPU rounds twice: torch multiplies
    by its reciprocal there. Counts the other divisions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.div, torch.ops.aten.div_):
            divisor = args[1]
            # A number that has become a tensor of the CPU counts as one.
            assert isinstance(divisor, Tensor), f"{func} by {divisor}"
            assert divisor.device == META, f"{func} by {divisor}"
            self.seen += 1
        return func(*args, **(kwargs or {}))


def group(x: Tensor) -> Tensor:
    groups = x.unflatten(1, (-1, 4))
    scale, offset = group_qparams(groups.amin(2), groups.amax(2), ceil=True)
    return group_codes(groups, scale, offset)


@pytest.mark.parametrize(
    "quantize",
    [quantize_per_token, lambda x: affine_quantize(x, 4), channel_scales, group],
    ids=["activation", "affine", "level 1", "level 2"],
)
def test_every_division_is_rounded_once(quantize: Callable[[Tensor], object]) -> None:
    with Divisors() as divisors:
        quantize(torch.empty(3, 8, device=META))
    assert divisors.seen > 0


def test_numbers_are_seen() -> None:
    with pytest.raises(AssertionError, match=r"by 127"), Divisors():
        torch.empty(3, device=META) / 127
