"""What quantization tells about itself: plain numbers per layer, kept beside the checkpoint."""

from typing import Any

import torch
from torch import Tensor

from qoq.quantize.block import Block
from qoq.quantize.statistics import LayerStatistics

REPORT_NAME = "quantization_report.json"


def summarize(block: Block, statistics: LayerStatistics) -> dict[str, Any]:
    """Ranges of keys, values and block-output inputs as they would be quantized now.

    Per-channel absmax lists for keys (less the center, if set), summaries for the rest.
    """
    keys, values = statistics.sample("keys"), statistics.sample("values")
    if block.k_center is not None:
        keys = keys - block.k_center
    if block.k_rotation is not None:
        keys = keys @ block.k_rotation
    return {
        "key_absmax": _round(keys.abs().amax(dim=0).flatten()),
        "key_range": _spread(keys.amax(dim=-1) - keys.amin(dim=-1)),
        "value_range": _spread(values.amax(dim=-1) - values.amin(dim=-1)),
        "o_proj_input": _spread(statistics.absmax["self_attn.o_proj"]),
        "down_proj_input": _spread(statistics.absmax["mlp.down_proj"]),
    }


def _spread(x: Tensor) -> dict[str, float]:
    flat = x.flatten().to(torch.float32)
    return {
        "median": float(flat.median()),
        "p99": float(torch.quantile(flat[:1_000_000], 0.99)),
        "max": float(flat.max()),
    }


def _round(x: Tensor) -> list[float]:
    return [round(float(value), 4) for value in x]
