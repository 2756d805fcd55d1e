"""KVPool: every layer's KV pages, how many fit a memory budget, and where a token's slot is."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qoq.errors import ResourceError
from qoq.formats.kv import KVPages, page_bytes
from qoq.formats.scheme import KVFormat


class KVPool:
    """The cache of one model: ``layers[i]`` are layer i's KVPages; a page id means the same page
    in every layer.

    ``dtype`` is that of 16-bit (unquantized) entries only.
    """

    def __init__(
        self,
        format: KVFormat,
        num_layers: int,
        num_pages: int,
        num_kv_heads: int,
        page_size: int,
        head_dim: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.format = format
        self.num_pages = num_pages
        self.page_size = page_size
        self.layers: list[KVPages] = [
            KVPages.empty(
                format, num_pages, num_kv_heads, page_size, head_dim, device=device, dtype=dtype
            )
            for _ in range(num_layers)
        ]

    @property
    def num_tokens(self) -> int:
        """Tokens the cache holds when every page is full."""
        return self.num_pages * self.page_size

    @property
    def nbytes(self) -> int:
        """Bytes of all pages of all layers, codes and scales."""
        return sum(t.nbytes for pages in self.layers for t in _tensors(pages))


def _tensors(pages: KVPages) -> tuple[Tensor, ...]:
    return (
        pages.k_codes,
        pages.k_scale,
        pages.k_offset,
        pages.v_codes,
        pages.v_scale,
        pages.v_offset,
    )


def pages_for_budget(
    budget: int,
    format: KVFormat,
    num_layers: int,
    num_kv_heads: int,
    page_size: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
) -> int:
    """How many pages, all layers counted, fit in ``budget`` bytes; ResourceError if none."""
    each = num_layers * page_bytes(format, num_kv_heads, page_size, head_dim, dtype.itemsize)
    if budget < each:
        raise ResourceError(
            f"One KV page of {page_size} tokens takes {each:,} bytes over {num_layers} layers, the "
            f"budget is {budget:,}. Give the KV cache more memory or use fewer bits."
        )
    return budget // each


def pages_for_tokens(tokens: int, page_size: int) -> int:
    """Pages a sequence of ``tokens`` tokens occupies."""
    return -(-tokens // page_size)


def slots_for(pages: Sequence[int], start: int, stop: int, page_size: int) -> list[int]:
    """Slots of a sequence's tokens start..stop-1, given its page ids in order."""
    return [pages[i // page_size] * page_size + i % page_size for i in range(start, stop)]


def page_table(sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Tensor:
    """int32 [S, max_pages] of the sequences' page ids; unused places are 0 and never read."""
    width = max((len(pages) for pages in sequences), default=0)
    rows = [[*pages, *[0] * (width - len(pages))] for pages in sequences]
    return torch.tensor(rows, dtype=torch.int32, device=device).reshape(len(rows), width)
