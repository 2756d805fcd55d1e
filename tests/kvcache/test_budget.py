"""PoolShape: exact bytes, no more than is of use, and refusals that name both numbers."""

from pathlib import Path

import pytest
import torch

from qoq.errors import RequestError, ResourceError
from qoq.formats.scheme import KVFormat
from qoq.kvcache import budget
from qoq.kvcache.budget import PoolShape, memory_at_hand

SHAPE = PoolShape(KVFormat(4, 8), num_layers=3, num_kv_heads=2, page_size=16, head_dim=32)


@pytest.mark.parametrize("bits", [(4, 4), (8, 4), (16, 16)])
def test_a_page_takes_the_bytes_it_says(bits: tuple[int, int]) -> None:
    shape = PoolShape(KVFormat(*bits), 3, 2, 16, 32, torch.bfloat16)
    assert shape.pool(5).nbytes == 5 * shape.page_bytes


def test_given_bytes_and_what_is_of_use() -> None:
    def pages(budget: int, requests: int = 100) -> int:
        return SHAPE.pages(
            max_requests=requests, max_model_len=40, kv_cache_memory_bytes=budget * SHAPE.page_bytes
        )

    assert pages(7) == 7
    assert pages(1000, requests=4) == 4 * 3
    with pytest.raises(ResourceError, match=r"one request of 40 tokens takes .* hold 32 tokens"):
        pages(2)


def test_a_share_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "memory_at_hand", lambda device: 100 * SHAPE.page_bytes)
    options = {"max_requests": 1000, "max_model_len": 100}
    assert SHAPE.pages(**options) == 80
    assert SHAPE.pages(**options, memory_fraction=0.25) == 25
    for wrong in (0, 1.5):
        with pytest.raises(RequestError, match="memory_fraction"):
            SHAPE.pages(**options, memory_fraction=wrong)


def test_a_cgroup_bounds_what_is_free(tmp_path: Path) -> None:
    free = memory_at_hand(cgroup=tmp_path)
    assert free > 0
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("3000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 100\nactive_file 20\n")
    assert memory_at_hand(cgroup=tmp_path) == 5000 - 3000 + 120
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_at_hand(cgroup=tmp_path) > 5000
