"""C++ twin of sample: the oracle's ids, without sorting the vocabulary.

Noise and probabilities are fp64 here and there, from different libraries: an id could differ where
two candidates, or a cumulative probability and top_p, agree to 15 digits.
"""

from typing import Any

import torch
from torch import Tensor

from qoq.kernels.cpu.backend import CPU, address, backend, extension, row_address, rows
from qoq.kernels.cpu.backend import unsupported as unsupported_device
from qoq.kernels.sample import SampleOutput, SamplingBatch, sample_oracle


def unsupported(device: torch.device, **what: Any) -> str | None:
    """See ``dispatch.Twin``."""
    return unsupported_device(device)


def sample(logits: Tensor, params: SamplingBatch) -> SampleOutput:
    """See ``qoq.kernels.sample``."""
    if not logits.numel():
        return sample_oracle(logits, params)
    logits = rows(logits)
    count, vocab = logits.shape
    if vocab >= 1 << 32:
        raise ValueError(f"a vocabulary of {vocab} ids is too large")
    columns = [
        getattr(params, name).to(dtype).contiguous()
        for name, dtype in (
            ("temperature", torch.float32),
            ("top_k", torch.int64),
            ("top_p", torch.float32),
            ("min_p", torch.float32),
            ("seeds", torch.int64),
            ("step", torch.int64),
        )
    ]
    ids = torch.empty(count, dtype=torch.int64, device=CPU)
    logprobs = torch.empty(count, dtype=torch.float32, device=CPU)
    extension().sample(
        backend(),
        count,
        vocab,
        row_address(logits, count, vocab),
        logits.stride(0),
        *(address(column, column.dtype, count) for column in columns),
        ids.data_ptr(),
        logprobs.data_ptr(),
    )
    return SampleOutput(ids, logprobs)
