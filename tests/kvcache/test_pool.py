"""KVPool: bytes as promised, slots where kv_append and attention look for them."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qoq.errors import ResourceError
from qoq.formats.scheme import KVFormat
from qoq.kernels.attention import attention
from qoq.kernels.kv_append import kv_append
from qoq.kvcache.allocator import PageAllocator
from qoq.kvcache.pool import KVPool, page_table, pages_for_budget, pages_for_tokens, slots_for


@pytest.mark.parametrize("bits", list(itertools.product((4, 8, 16), repeat=2)))
def test_budget_is_what_the_pages_take(bits: tuple[int, int]) -> None:
    shape = {"num_layers": 3, "num_kv_heads": 2, "page_size": 16, "head_dim": 8}
    pool = KVPool(KVFormat(*bits), num_pages=5, **shape, dtype=torch.bfloat16)
    assert len(pool.layers) == 3
    assert pool.num_tokens == 80
    assert all(p.num_pages == 5 and p.page_size == 16 for p in pool.layers)

    def fits(budget: int) -> int:
        return pages_for_budget(budget, KVFormat(*bits), **shape, dtype=torch.bfloat16)

    assert fits(pool.nbytes) == 5
    assert fits(pool.nbytes + 1) == 5
    assert fits(pool.nbytes - 1) == 4
    with pytest.raises(ResourceError, match="more memory"):
        fits(pool.nbytes // 5 - 1)


def test_layers_share_no_memory() -> None:
    pool = KVPool(KVFormat(4, 4), 2, 3, 1, 4, 8)
    pool.layers[0].k_codes.fill_(7)
    assert pool.layers[1].k_codes.eq(0).all()


@given(
    pages=st.lists(st.integers(0, 99), min_size=1, max_size=6, unique=True),
    page_size=st.integers(1, 7),
    data=st.data(),
)
def test_slots(pages: list[int], page_size: int, data: st.DataObject) -> None:
    total = len(pages) * page_size
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    every = [page * page_size + offset for page in pages for offset in range(page_size)]
    assert slots_for(pages, start, stop, page_size) == every[start:stop]


def test_pages_for_tokens() -> None:
    assert [pages_for_tokens(t, 16) for t in (0, 1, 16, 17, 32, 33)] == [0, 1, 1, 2, 2, 3]


def test_page_table_pads_to_the_longest() -> None:
    table = page_table([[4, 2], [], [7, 8, 9]])
    assert table.dtype == torch.int32
    assert table.tolist() == [[4, 2, 0], [0, 0, 0], [7, 8, 9]]
    assert page_table([]).shape == (0, 0)
    assert page_table([[], []]).shape == (2, 0)


def test_allocator_pool_append_and_attention_agree() -> None:
    # Two sequences grow token by token, their pages interleaved; what attention reads is what was
    # appended: the values of its own sequence, weighted by a softmax over float keys.
    size, heads, dim = 4, 2, 8
    pool = KVPool(KVFormat(16, 16), 1, 6, heads, size, dim)
    allocator = PageAllocator(pool.num_pages)
    owned: list[list[int]] = [[], []]
    k, v = (torch.randn(2, 10, heads, dim) for _ in range(2))
    one, zero = torch.ones(1, dim // 2), torch.zeros(1, dim // 2)
    for t, s in itertools.product(range(10), range(2)):
        if t % size == 0:
            owned[s] += allocator.allocate(1)
        q = torch.randn(1, heads, dim)
        slot = torch.tensor(slots_for(owned[s], t, t + 1, size))
        kv_append(q, k[s, t : t + 1], v[s, t : t + 1], one, zero, slot, pool.layers[0])
        table, lens, cu = page_table([owned[s]]), torch.tensor([t + 1]), torch.tensor([0, 1])
        got = attention(q, pool.layers[0], table, lens, cu, 0.5)
        probs = (torch.einsum("hd,jhd->hj", q[0], k[s, : t + 1]) * 0.5).softmax(-1)
        want = torch.einsum("hj,jhd->hd", probs, v[s, : t + 1])
        torch.testing.assert_close(got[0], want, rtol=1e-4, atol=1e-5)
    assert allocator.num_free == 0
