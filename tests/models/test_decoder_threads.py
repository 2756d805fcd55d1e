"""A decoder whose linears run on kernels of our own leaves torch one thread."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from qoq.bench.random_weights import random_decoder
from qoq.bench.shapes import config_of
from qoq.formats.scheme import QuantScheme
from qoq.kernels.cpu import backend
from qoq.kvcache.pool import KVPool
from qoq.models import decoder
from qoq.models.batch import Batch
from qoq.models.rope import cos_sin

pytestmark = pytest.mark.usefixtures("three_torch_threads")


@pytest.mark.skipif(backend.missing() is not None, reason=str(backend.missing()))
@pytest.mark.parametrize(("runs_on", "threads"), [("cpu", 1), ("oracle", 3)])
def test_torch_threads_inside_a_call(
    runs_on: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 50}
    config = replace(config_of("llama-3.2-1b", 1), num_heads=2, num_kv_heads=1, **small)
    scheme = QuantScheme.parse("w4a8kv4-g32")
    run = random_decoder(config, scheme, backend=runs_on)
    batch = Batch.prefill([[1, 2, 3]], 64)
    pool = KVPool(scheme.kv, 1, 1, config.num_kv_heads, 64, config.head_dim)
    seen = []

    def watched(rope: Any, positions: torch.Tensor) -> Any:
        seen.append(torch.get_num_threads())
        return cos_sin(rope, positions)

    monkeypatch.setattr(decoder, "cos_sin", watched)
    run(batch, pool.layers, backend=runs_on)
    assert seen == [threads]
