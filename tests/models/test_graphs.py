"""DecodeGraphs without a GPU: what is replayed is the step itself, on the padded batch."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers.tiny import TWO_LAYERS
from qoq.bench.random_weights import random_decoder
from qoq.formats.scheme import QuantScheme
from qoq.kvcache.pool import KVPool
from qoq.models.batch import Batch, BatchShape
from qoq.models.config import ModelConfig
from qoq.models.graphs import DecodeGraphs, page_sizes, prompt_sizes, recorder, sequence_sizes

CPU = torch.device("cpu")
PAGE = 4


class Replays:
    """Records by keeping what is to be run, and counts."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.recorded += 1
        out = run()

        def replay() -> Tensor:
            self.replayed += 1
            return out.copy_(run())

        return replay


def test_sizes() -> None:
    assert sequence_sizes(1) == [1]
    assert sequence_sizes(5) == [1, 2, 4, 5]
    assert sequence_sizes(64) == [1, 2, 4, 8, 16, 24, 32, 48, 64]
    assert sequence_sizes(200) == [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 200]
    assert page_sizes(3) == [3]
    assert page_sizes(16) == [16]
    assert page_sizes(2048) == [16, 64, 256, 1024, 2048]
    assert prompt_sizes(1) == [1]
    assert prompt_sizes(16) == [16]
    assert prompt_sizes(100) == [16, 32, 64, 100]
    assert prompt_sizes(2048) == [16, 32, 64, 128, 256, 512, 1024, 2048]


@given(most=st.integers(1, 300), pages=st.integers(1, 3000), data=st.data())
def test_the_smallest_size_that_holds_a_batch(most: int, pages: int, data: st.DataObject) -> None:
    graphs = DecodeGraphs(lambda batch: batch.slots, most, pages, CPU, Replays())
    count, wide = data.draw(st.integers(1, most)), data.draw(st.integers(1, pages))
    shape = graphs.shape(count, wide)
    assert shape is not None
    assert shape.tokens == shape.sequences
    assert count <= shape.sequences <= max(2 * count, 1)
    assert wide <= shape.pages <= max(4 * wide, 16)
    assert graphs.shape(most + 1, wide) is None
    assert graphs.shape(count, pages + 1) is None


@pytest.mark.parametrize("backend", ["auto", "oracle"])
@pytest.mark.parametrize("all_at_once", [True, False])
def test_padded_steps_are_plain_ones_to_the_bit(backend: str, all_at_once: bool) -> None:
    config, scheme = ModelConfig.from_hf(TWO_LAYERS), QuantScheme.parse("w4a8kv4-g32")
    decoder = random_decoder(config, scheme, backend=backend)

    def pool() -> KVPool:
        return KVPool(scheme.kv, 2, 40, 2, PAGE, 16)

    plain, padded = pool(), pool()
    replays = Replays()
    graphs = DecodeGraphs(
        lambda batch: decoder(batch, padded.layers, backend=backend), 5, 20, CPU, replays
    )
    if all_at_once:
        seen: list[tuple[int, int]] = []
        graphs.record_all(lambda done, total: seen.append((done, total)))
        assert seen == [(i, 8) for i in range(9)]  # 1, 2, 4, 5 sequences; 16, 20 pages
    draw = np.random.default_rng(1)
    lengths = np.array([3, 0, 41, 17, 70])
    tables = draw.permutation(40)[:40].reshape(5, 8).astype(np.int32)
    tables = np.concatenate([tables, np.zeros((5, 12), np.int32)], axis=1)
    tables[4, :20] = draw.permutation(40)[:20]  # the only long one, alone in its batches
    for count, chosen in ((3, [0, 1, 3]), (1, [1]), (2, [0, 3]), (1, [4]), (2, [0, 1])):
        ids = draw.integers(0, 61, count)
        table = tables[chosen][:, : 20 if chosen == [4] else 8]
        arrays = (ids, lengths[chosen], np.ones(count, dtype=np.int64), table, PAGE)
        want = decoder(Batch.ragged(*arrays), plain.layers, backend=backend)
        shape = graphs.shape(count, table.shape[1])
        assert shape is not None
        got = graphs.run(shape, lambda batch, arrays=arrays: batch.fill(*arrays))
        assert got.shape == (shape.tokens, 61)
        assert torch.equal(got[:count], want)
        for a, b in zip(plain.layers, padded.layers, strict=True):
            for name in ("k_codes", "k_scale", "v_codes", "v_offset"):
                assert torch.equal(getattr(a, name), getattr(b, name)), name
        lengths[chosen] += 1
    assert replays.replayed == 5
    assert replays.recorded == (8 if all_at_once else 4)


def test_recording_writes_no_keys_and_reads_no_stale_batch() -> None:
    seen: list[list[int]] = []

    def step(batch: Batch) -> Tensor:
        seen.append([*batch.slots.tolist(), *batch.kv_lens.tolist()])
        return batch.slots.float()

    graphs = DecodeGraphs(step, 2, 16, CPU, Replays())
    one, two = BatchShape(1, 1, 16), BatchShape(2, 2, 16)
    table = np.full((1, 1), 3, dtype=np.int32)
    arrays = (np.array([9]), np.array([2]), np.array([1]), table, PAGE)
    graphs.run(one, lambda batch: batch.fill(*arrays))
    graphs.run(two, lambda batch: batch.fill(*arrays))
    assert seen == [[-1, 0], [14, 3], [-1, -1, 0, 0], [14, -1, 3, 0]]


def test_only_gpus_record() -> None:
    assert recorder(CPU) is None


def test_graphs_are_recorded_on_the_device_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    streams: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "Stream", streams.append)  # without a device: the current one
    assert recorder(torch.device("cuda", 1)) is not None
    assert streams == [torch.device("cuda", 1)]
