"""Whether a full-precision model can be held in memory beside a packed one."""

from math import prod
from pathlib import Path

import psutil

from qoq.checkpoint.hf import HFSource

SHARE = 0.7  # of the memory that is free; the rest is for logits, caches and the packed model


def fits_in_memory(folder: Path) -> bool:
    """Whether a source folder's tensors, in the fp32 that the oracle computes in, fit."""
    source = HFSource(folder)
    needed = 4 * sum(prod(source.shape(name)) for name in source.names())
    return bool(needed < SHARE * psutil.virtual_memory().available)
