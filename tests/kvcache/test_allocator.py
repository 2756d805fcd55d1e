"""PageAllocator: no page in two hands, ever."""

import ast
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qoq.errors import KVCacheFullError, QoqError
from qoq.kvcache import allocator as allocator_module
from qoq.kvcache.allocator import PageAllocator


def test_fresh_pages_come_in_order() -> None:
    pages = PageAllocator(5)
    assert pages.num_free == 5
    assert pages.allocate(2) == [0, 1]
    assert pages.allocate(0) == []
    assert pages.allocate(3) == [2, 3, 4]
    assert pages.num_free == 0


def test_freed_pages_come_back() -> None:
    pages = PageAllocator(3)
    pages.allocate(3)
    pages.free([1])
    assert pages.allocate(1) == [1]
    pages.free(iter([2, 0]))
    assert pages.allocate(2) == [2, 0]


def test_full_cache_takes_nothing() -> None:
    pages = PageAllocator(4)
    pages.allocate(3)
    with pytest.raises(KVCacheFullError, match="2 KV pages are needed but only 1 of 4") as caught:
        pages.allocate(2)
    assert isinstance(caught.value, QoqError)
    assert pages.num_free == 1
    assert pages.allocate(1) == [3]


@pytest.mark.parametrize("ids", [[0, 0], [3], [-1], [99], [0, 1, 7]])
def test_wrong_frees_are_refused_and_free_nothing(ids: list[int]) -> None:
    pages = PageAllocator(4)
    pages.allocate(3)
    with pytest.raises(ValueError):
        pages.free(ids)
    assert pages.num_free == 1
    pages.free([0, 1, 2])
    with pytest.raises(ValueError, match="not in use"):
        pages.free([0])


def test_negative_counts() -> None:
    with pytest.raises(ValueError):
        PageAllocator(-1)
    with pytest.raises(ValueError):
        PageAllocator(1).allocate(-1)
    assert PageAllocator(0).num_free == 0


@given(size=st.integers(0, 12), data=st.data())
def test_against_a_set(size: int, data: st.DataObject) -> None:
    pages, used = PageAllocator(size), set[int]()
    for _ in range(data.draw(st.integers(0, 30))):
        if used and data.draw(st.booleans()):
            back = data.draw(st.lists(st.sampled_from(sorted(used)), unique=True))
            pages.free(back)
            used -= set(back)
        else:
            n = data.draw(st.integers(0, 5))
            if n > size - len(used):
                with pytest.raises(KVCacheFullError):
                    pages.allocate(n)
            else:
                got = pages.allocate(n)
                assert len(got) == len(set(got)) == n
                assert not used & set(got)
                assert set(got) <= set(range(size))
                used |= set(got)
        assert pages.num_free == size - len(used)


def test_policy_without_tensors() -> None:
    tree = ast.parse(Path(str(allocator_module.__file__)).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert "torch" not in " ".join(ast.unparse(node) for node in imports)
