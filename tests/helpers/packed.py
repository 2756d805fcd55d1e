"""Packed checkpoints of random numbers that the format allows."""

import torch
from torch import Tensor

from qoq.formats.scheme import QuantScheme
from qoq.models.anatomy import packed_tensors
from qoq.models.config import ModelConfig


def random_packed_tensors(
    config: ModelConfig, scheme: QuantScheme, *, k_center: bool = True
) -> dict[str, Tensor]:
    """Random tensors for every name a packed checkpoint of this scheme holds."""
    tensors: dict[str, Tensor] = {}
    for name, (shape, dtype) in packed_tensors(config, scheme, k_center).items():
        if name.endswith("codes"):
            low = -127 if dtype == torch.int8 else 0
            tensors[name] = torch.randint(low, 127, shape).to(dtype or torch.uint8)
        elif name.endswith("group_scale"):
            tensors[name] = torch.randint(1, 9, shape).to(torch.uint8)
        elif name.endswith("group_offset"):
            tensors[name] = torch.randint(-119, -30, shape).to(torch.int8)
        elif name.endswith("channel_scale") or (name.endswith("scale") and dtype is not None):
            tensors[name] = torch.rand(shape) * 0.004 + 0.001
        else:
            spread = 0.02 if name.endswith("offset") else 0.5
            tensors[name] = torch.randn(shape) * spread + (1.0 if "norm" in name else 0.0)
    return tensors
