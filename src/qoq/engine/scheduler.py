"""Scheduler: which requests run next, how far each is read, whose pages are whose; no tensors.

Requests stand in line by (priority, arrival), lower first. One that is let in gets a row (its place
among those that run) and pages for the tokens it has; it gets another page when it has filled
them. When there is none left, the last in line of those that run is thrown out: it keeps its
tokens, goes back to its place in line and is read again later (preemption by recompute).
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from qoq.engine.line import Line
from qoq.engine.request import Request
from qoq.kvcache.allocator import PageAllocator
from qoq.kvcache.prefix import extend_keys, root_key

LOOKS = 16  # requests that a step may look at in line and leave there (see _admit)


class Chunk(NamedTuple):
    """One request's part of a step: its ids start..stop-1 are read."""

    request: Request
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """A step: ``chunks``, those of one token first; ``admitted`` requests have new rows and pages,
    ``grown`` ones have more pages than before.
    """

    chunks: list[Chunk] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)
    grown: list[Request] = field(default_factory=list)


class Scheduler:
    """plan() a step, run it, then advance() what was read and release() what has ended.

    ``preemptions``, ``prefix_queries`` and ``prefix_hits`` (tokens looked for and found in the
    prefix cache when requests were first let in) only grow.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        *,
        max_requests: int,
        max_step_tokens: int,
        enable_prefix_caching: bool = True,
    ) -> None:
        """max_requests run at a time, a step reads max_step_tokens tokens, or a few more where that
        is not even one for each request.
        """
        self.pages = PageAllocator(num_pages)
        self.preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._page_size = page_size
        self._budget = max(max_step_tokens, max_requests + 1)
        self._caching = enable_prefix_caching
        self._rows = list(range(max_requests - 1, -1, -1))  # free rows, a stack
        self._running: list[Request] = []  # in order
        self._line = Line()
        self._arrivals = count()
        self._reading: dict[bytes, Request] = {}  # pages to come, and who is reading them

    @property
    def num_waiting(self) -> int:
        return len(self._line)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def running(self) -> Sequence[Request]:
        """Those that run, in order of (priority, arrival)."""
        return self._running

    def add(self, request: Request) -> None:
        """Put a request in line. All pages together must be able to hold it at its longest."""
        request.order = (request.priority, next(self._arrivals))
        self._line.push(request)

    def plan(self) -> Plan:
        """The next step; its requests have the pages for it. Empty only if nothing is left."""
        grown = self._grow()
        admitted = self._admit()
        # Whoever is let in may have thrown out others of lower priority.
        return Plan(self._chunks(), admitted, [request for request in grown if request.row >= 0])

    def advance(self, chunks: Sequence[Chunk]) -> None:
        """Note that these chunks are in the cache; pages that became full can be found from now."""
        for chunk in chunks:
            request, full = chunk.request, chunk.stop // self._page_size
            request.num_cached = chunk.stop
            if full > request.num_named and self._names(request):
                self._name(request, full)

    def release(self, request: Request) -> None:
        """Take a request that has ended out of line, or free its row and pages."""
        if request.row >= 0:
            self._leave(request)
        elif request.order[1] >= 0:
            self._line.forget()
        request.order = (request.priority, -1)

    def preempt(self, request: Request) -> None:
        """Throw a running request out: its pages are free, it waits and will be read again."""
        self._leave(request)
        request.num_preemptions += 1
        self.preemptions += 1
        self._line.push(request)

    def _leave(self, request: Request) -> None:
        """Give back what a running request holds."""
        self.pages.free(request.pages)
        self._rows.append(request.row)
        for key in request.keys[request.num_named :]:
            if self._reading.get(key) is request:
                del self._reading[key]
        request.row, request.pages, request.num_cached, request.num_named = -1, [], 0, 0
        del self._running[bisect.bisect_left(self._running, request.order, key=_order)]

    def _grow(self) -> list[Request]:
        """Pages for all that run, the first in line first, at the cost of the last in line."""
        grown = []
        for request in tuple(self._running):
            missing = self._pages_for(request) - len(request.pages)
            if request.row < 0 or missing <= 0:
                continue
            while request.row >= 0 and self.pages.num_free < missing:
                self.preempt(self._running[-1])
            if request.row >= 0:
                request.pages += self.pages.allocate(missing)
                grown.append(request)
        return grown

    def _admit(self) -> list[Request]:
        """Let requests in, in order, while there is room for the next one.

        One whose next page is being read for another request right now is left in line (and those
        behind it may pass) until it can share that page.
        """
        admitted: list[Request] = []
        later: list[Request] = []
        while len(later) < LOOKS and (request := self._line.first()) is not None:
            cached = self._find(request)
            if self._is_read_by_another(request, len(cached)):
                later.append(self._line.pop())
            elif self._has_room(request, cached) or self._make_room(request, cached):
                self._enter(self._line.pop(), cached)
                admitted.append(request)
            else:
                break
        for request in later:
            self._line.push(request)
        return admitted

    def _has_room(self, request: Request, cached: Sequence[int]) -> bool:
        """A row, and pages for what it has while all that run and still grow can get one more."""
        if not self._rows:
            return False
        size = self._page_size
        spare = sum(r.max_length - 1 > len(r.pages) * size for r in self._running)
        new = self._pages_for(request) - len(cached) + self.pages.num_unused(cached)
        return new + spare <= self.pages.num_free

    def _make_room(self, request: Request, cached: Sequence[int]) -> bool:
        """Throw out requests of lower priority, the last in line first, until there is room."""
        while self._running and self._running[-1].priority > request.priority:
            self.preempt(self._running[-1])
            if self._has_room(request, cached):
                return True
        return False

    def _enter(self, request: Request, cached: list[int]) -> None:
        """Give a request its row and pages; ``cached`` ones hold its first tokens already."""
        self.pages.share(cached)
        new = self.pages.allocate(self._pages_for(request) - len(cached))
        request.pages = cached + new
        request.num_named = len(cached)
        request.num_cached = len(cached) * self._page_size
        request.row = self._rows.pop()
        bisect.insort(self._running, request, key=_order)
        for key in request.keys[len(cached) :]:
            self._reading.setdefault(key, request)
        if request.num_preemptions == 0:
            request.num_cached_prompt_tokens = request.num_cached
            self.prefix_queries += len(request.ids) if self._names(request) else 0
            self.prefix_hits += request.num_cached

    def _find(self, request: Request) -> list[int]:
        """Cached pages of a request's first tokens; its last token is always read anew, because
        its logits are wanted.
        """
        if not self._names(request):
            return []
        size, ids = self._page_size, request.ids
        extend_keys(request.keys, root_key(request.cache_salt), ids, size, len(ids))
        if request.params.prompt_logprobs is not None:
            return []  # its prompt is scored, every row of it
        return self.pages.find(request.keys[: (len(ids) - 1) // size])

    def _is_read_by_another(self, request: Request, num_found: int) -> bool:
        if num_found >= (len(request.ids) - 1) // self._page_size or not self._names(request):
            return False
        reader = self._reading.get(request.keys[num_found])
        return reader is not None and reader.priority <= request.priority

    def _name(self, request: Request, full: int) -> None:
        """Let others find the first ``full`` pages of a request."""
        root = root_key(request.cache_salt)
        extend_keys(request.keys, root, request.ids, self._page_size, full * self._page_size)
        for at in range(request.num_named, full):
            key = request.keys[at]
            self.pages.name(request.pages[at], key)
            if self._reading.get(key) is request:
                del self._reading[key]
        request.num_named = full

    def _names(self, request: Request) -> bool:
        """Whether this request's pages are named: all, or those of requests that share a salt."""
        return self._caching or request.cache_salt != ""

    def _pages_for(self, request: Request) -> int:
        return -(-len(request.ids) // self._page_size)

    def _chunks(self) -> list[Chunk]:
        """The next token of all that generate, and prompts while the step's budget lasts.

        The first prompt in line gets half the budget, and what no other wants; the others share the
        rest, the shortest first. So a long prompt neither holds up short ones nor waits for them.
        """
        chunks, prompts = [], []
        for request in self._running:
            length = len(request.ids)
            if length - request.num_cached == 1:
                chunks.append(Chunk(request, length - 1, length))
            else:
                prompts.append(request)
        if not prompts:
            return chunks
        left = self._budget - len(chunks)
        first, *others = prompts
        taken = {first.row: min(_unread(first), -(-left // 2))}
        left -= taken[first.row]
        for request in sorted(others, key=_unread):
            taken[request.row] = min(_unread(request), left)
            left -= taken[request.row]
        taken[first.row] += min(_unread(first) - taken[first.row], left)
        chunks += [
            Chunk(request, request.num_cached, request.num_cached + taken[request.row])
            for request in prompts
            if taken[request.row]
        ]
        return chunks


def _order(request: Request) -> tuple[int, int]:
    return request.order


def _unread(request: Request) -> int:
    return len(request.ids) - request.num_cached
