"""PageAllocator: which pages are free, shared or worth keeping; no tensors (QServe 5.3).

A full page can be named by a key that says which tokens it holds. When its last user lets go of
it, its content stays: it is free, yet it can be found by its key until its memory is needed.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from qoq.errors import KVCacheFullError


class PageAllocator:
    """Counts the users of page ids 0..num_pages-1 and hands out those that have none.

    Free pages without a name go first (the most recently freed of them), then named ones, least
    recently used first: their content is lost then.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 0:
            raise ValueError(f"a cache cannot have {num_pages} pages")
        self.num_pages = num_pages
        self._users = [0] * num_pages
        self._blank = list(range(num_pages - 1, -1, -1))  # a stack: its end is handed out next
        self._kept: OrderedDict[int, bytes] = OrderedDict()  # free but named, the oldest first
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Pages that can be handed out, named ones included."""
        return len(self._blank) + len(self._kept)

    @property
    def num_used(self) -> int:
        """Pages that someone uses."""
        return self.num_pages - self.num_free

    def users(self, page: int) -> int:
        """How many hold this page."""
        return self._users[page]

    def allocate(self, n: int) -> list[int]:
        """``n`` distinct page ids. Raises KVCacheFullError, and takes none, if fewer are free."""
        if n < 0:
            raise ValueError(f"cannot allocate {n} pages")
        if n > self.num_free:
            raise KVCacheFullError(
                f"{n} KV pages are needed but only {self.num_free} of {self.num_pages} are free. "
                "Wait for a request to finish, shorten the prompt or give the KV cache more memory."
            )
        pages = [self._blank.pop() if self._blank else self._evict() for _ in range(n)]
        for page in pages:
            self._users[page] = 1
        return pages

    def _evict(self) -> int:
        page, key = self._kept.popitem(last=False)
        del self._key_of[page], self._page_of[key]
        return page

    def name(self, page: int, key: bytes) -> None:
        """Let ``find`` find this used page by ``key``; if another page has the key, it keeps it.

        Raises ValueError for a page that nobody uses or that has another name.
        """
        if self._users[page] == 0 or self._key_of.get(page, key) != key:
            raise ValueError(f"page {page} is free or has a name already")
        if key not in self._page_of:
            self._page_of[key], self._key_of[page] = page, key

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The pages named by ``keys``, up to the first key that names none; takes no page."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def num_unused(self, pages: Sequence[int]) -> int:
        """How many of these pages nobody uses: sharing them lowers ``num_free`` by as many."""
        return sum(self._users[page] == 0 for page in pages)

    def share(self, pages: Sequence[int]) -> None:
        """One more user for each of these named or used pages."""
        for page in pages:
            if self._users[page] == 0:
                if page not in self._kept:
                    raise ValueError(f"page {page} is free and holds nothing worth sharing")
                del self._kept[page]
            self._users[page] += 1

    def free(self, ids: Iterable[int]) -> None:
        """One user fewer for each page; those given first are kept longest.

        Raises ValueError, and frees nothing, if one is unused or repeats.
        """
        pages = list(ids)
        if len(set(pages)) != len(pages):
            raise ValueError(f"pages {pages} repeat an id: a user lets go of a page once")
        foreign = [p for p in pages if not 0 <= p < self.num_pages or self._users[p] == 0]
        if foreign:
            raise ValueError(f"pages {foreign} are not in use: freed twice, or never allocated")
        # Backwards, because a sequence's later pages are worth nothing without its first ones.
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page]:
                continue
            key = self._key_of.get(page)
            if key is None:
                self._blank.append(page)
            else:
                self._kept[page] = key
