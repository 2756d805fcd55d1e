"""Batch: where every token's KV row lies."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qoq.models.batch import Batch, BatchShape


def test_the_docstring_example() -> None:
    batch = Batch.prefill([[10, 11, 12], [20, 21, 22, 23, 24]], 4)
    assert batch.input_ids.tolist() == [10, 11, 12, 20, 21, 22, 23, 24]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert batch.slots.tolist() == [0, 1, 2, 4, 5, 6, 7, 8]
    assert batch.page_table.tolist() == [[0, 0], [1, 2]]
    assert batch.kv_lens.tolist() == [3, 5]
    assert batch.cu_seqlens_q.tolist() == [0, 3, 8]
    assert (batch.num_pages, batch.num_tokens) == (3, 8)
    dtypes = {batch.page_table.dtype, batch.kv_lens.dtype, batch.cu_seqlens_q.dtype}
    assert dtypes == {torch.int32}
    assert {batch.input_ids.dtype, batch.positions.dtype, batch.slots.dtype} == {torch.int64}


def test_continuing_on_scattered_pages() -> None:
    batch = Batch.build([[7, 8], [], torch.tensor([9])], [3, 2, 0], [[5, 2], [1], [4]], 4)
    assert batch.positions.tolist() == [3, 4, 0]
    assert batch.slots.tolist() == [5 * 4 + 3, 2 * 4 + 0, 4 * 4]
    assert batch.kv_lens.tolist() == [5, 2, 1]
    assert batch.cu_seqlens_q.tolist() == [0, 2, 2, 3]
    assert batch.num_pages == 6


def test_empty() -> None:
    batch = Batch.prefill([], 4)
    assert (batch.num_tokens, batch.num_pages) == (0, 0)
    assert batch.cu_seqlens_q.tolist() == [0]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="5 tokens in 1 pages of 4"):
        Batch.build([[1] * 5], [0], [[0]], 4)
    with pytest.raises(ValueError, match="2 starts"):
        Batch.build([[1]], [0, 0], [[0]], 4)


@given(lengths=st.lists(st.integers(0, 40), max_size=6), page_size=st.integers(1, 17))
def test_prefill_gives_every_token_its_own_slot(lengths: list[int], page_size: int) -> None:
    batch = Batch.prefill([list(range(n)) for n in lengths], page_size)
    assert batch.slots.unique().numel() == batch.num_tokens == sum(lengths)
    assert batch.num_pages == sum(-(-n // page_size) for n in lengths)
    for s, n in enumerate(lengths):
        rows = slice(*batch.cu_seqlens_q[s : s + 2].tolist())
        at = torch.arange(n)
        page = batch.page_table[s].long()[at // page_size]
        assert torch.equal(batch.slots[rows], page * page_size + at % page_size)


@given(
    counts=st.lists(st.integers(0, 9), max_size=5),
    more=st.tuples(*[st.integers(0, 3)] * 3),
    page_size=st.integers(1, 5),
)
def test_padding(counts: list[int], more: tuple[int, int, int], page_size: int) -> None:
    """A larger batch, whatever it held before, is the plain one and rows that are nobody's."""
    draw = np.random.default_rng(0)
    starts = draw.integers(0, 20, len(counts))
    pages = 6 * 5
    table = draw.permutation(5 * pages)[: len(counts) * pages].reshape(-1, pages).astype(np.int32)
    ids = draw.integers(1, 99, sum(counts))
    plain = Batch.ragged(ids, starts, np.array(counts, dtype=np.int64), table, page_size)
    tokens, sequences, wide = sum(counts) + more[0], len(counts) + more[1], pages + more[2]
    shape = BatchShape(tokens, sequences, wide)
    padded = shape.views(shape.flat().random_())
    padded.fill(ids, starts, np.array(counts, dtype=np.int64), table, page_size)
    for name in ("input_ids", "positions", "slots"):
        own, rest = getattr(padded, name).split([sum(counts), more[0]])
        assert torch.equal(own, getattr(plain, name))
        assert rest.eq(-1 if name == "slots" else 0).all()
    assert torch.equal(padded.page_table[: len(counts), :pages], plain.page_table)
    assert padded.page_table.sum() == plain.page_table.sum()
    assert padded.kv_lens.tolist() == plain.kv_lens.tolist() + [0] * more[1]
    assert padded.cu_seqlens_q.tolist() == plain.cu_seqlens_q.tolist() + [sum(counts)] * more[1]
    assert padded.page_table.dtype == padded.kv_lens.dtype == torch.int32
