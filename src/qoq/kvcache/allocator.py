"""PageAllocator: which pages of the KV cache are free; pure Python, no tensors (QServe 5.3)."""

from collections.abc import Iterable

from qoq.errors import KVCacheFullError


class PageAllocator:
    """Hands out page ids 0..num_pages-1, lowest first at the start, then most recently freed."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 0:
            raise ValueError(f"a cache cannot have {num_pages} pages")
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: its end is handed out next
        self._used: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, n: int) -> list[int]:
        """``n`` distinct page ids. Raises KVCacheFullError, and takes none, if fewer are free."""
        if n < 0:
            raise ValueError(f"cannot allocate {n} pages")
        if n > len(self._free):
            raise KVCacheFullError(
                f"{n} KV pages are needed but only {len(self._free)} of {self.num_pages} are free. "
                "Wait for a request to finish, shorten the prompt or give the KV cache more memory."
            )
        split = len(self._free) - n
        pages = self._free[split:][::-1]
        del self._free[split:]
        self._used.update(pages)
        return pages

    def free(self, ids: Iterable[int]) -> None:
        """Give pages back. Raises ValueError, and frees nothing, if one is unused or repeats."""
        pages = list(ids)
        if len(set(pages)) != len(pages):
            raise ValueError(f"pages {pages} repeat an id: a page is freed once")
        foreign = [page for page in pages if page not in self._used]
        if foreign:
            raise ValueError(f"pages {foreign} are not in use: freed twice, or never allocated")
        self._used.difference_update(pages)
        self._free.extend(reversed(pages))
