"""Batch: where every token's KV row lies."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qoq.models.batch import Batch


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
