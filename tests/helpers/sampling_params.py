"""Sampling parameters to compare twins of sample by."""

import torch
from torch import Tensor

from qoq.kernels.sample import SamplingBatch


def random_params(
    rows: int, *, filters: bool = True, device: torch.device | str = "cpu"
) -> SamplingBatch:
    """Every mixture of greedy, plain and filtered rows."""

    def some(values: Tensor, off: float) -> Tensor:
        chosen = torch.rand(rows) < (0.5 if filters else 0.0)
        return torch.where(chosen, values, torch.full_like(values, off))

    heat = torch.rand(rows) * 2 + 0.05
    columns = (
        torch.where(torch.rand(rows) < 0.2, 0.0, heat),
        some(torch.randint(1, 80, (rows,)), 0),
        some(torch.rand(rows) * 0.98 + 0.01, 1),
        some(torch.rand(rows) ** 3, 0),
        torch.randint(-(1 << 62), 1 << 62, (rows,)),
        torch.randint(0, 1000, (rows,)),
    )
    return SamplingBatch(*(column.to(device) for column in columns))
