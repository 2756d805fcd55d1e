"""Scheduler: which requests run next, how far each is read, whose pages are whose; no tensors.

Requests stand in line by (priority, arrival), lower first. One that is let in gets a row (its place
among those that run) and pages for the tokens it has; it gets another page when it has filled
them. When there is none left, the last in line of those that run is thrown out: it keeps its
tokens, goes back to its place in line and is read again later (preemption by recompute).

Guessed ids get what is left once all this is settled: rows that no prompt wants, and pages beyond
the next one of each that runs. Neither now nor in the next step is anybody thrown out for them.
"""

import bisect
from collections.abc import Callable, Sequence
from itertools import count

from qoq.engine.line import Line
from qoq.engine.plan import Chunk, Plan, cut
from qoq.engine.request import Request
from qoq.kvcache.allocator import PageAllocator
from qoq.kvcache.prefix import extend_keys, root_key

LOOKS = 16  # requests that a step may look at in line and leave there (see _admit)

# At most so many ids that may follow a request's own.
Guess = Callable[[Request, int], Sequence[int]]


class Scheduler:
    """plan() a step, run it, give its requests their new ids, then advance() what was read and
    release() what has ended.

    ``preemptions``, ``prefix_queries`` and ``prefix_hits`` (tokens looked for and found in the
    prefix cache when requests were first let in), ``drafts`` (times anything was guessed for a
    request), ``draft_tokens`` and ``accepted_tokens`` (ids guessed, and new ids that came of them)
    only grow.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        *,
        max_requests: int,
        max_step_tokens: int,
        enable_prefix_caching: bool = True,
        guess: Guess | None = None,
    ) -> None:
        """max_requests run at a time, a step reads max_step_tokens tokens, or a few more where that
        is not even one for each request. ``guess`` is asked for ids behind those that generate.
        """
        self.pages = PageAllocator(num_pages)
        self.preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.drafts = 0
        self.draft_tokens = 0
        self.accepted_tokens = 0
        self._page_size = page_size
        self._budget = max(max_step_tokens, max_requests + 1)
        self._caching = enable_prefix_caching
        self._guess = guess
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
        grown = [request for request in grown if request.row >= 0]
        chunks = cut(self._running, self._budget)
        if self._guess is not None:
            chunks = self._add_guesses(chunks, self._guess, grown)
        return Plan(chunks, admitted, grown)

    def advance(self, chunks: Sequence[Chunk]) -> None:
        """Note that these chunks are in the cache, of their guesses those that became new ids.

        Pages that became full can be found from now; those of wrong guesses alone are given back.
        """
        for chunk in chunks:
            request = chunk.request
            request.num_cached = chunk.stop
            if chunk.guessed:
                self._keep_right(chunk)
            full = request.num_cached // self._page_size
            if full > request.num_named and self._caching:
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
        new = self._pages_for(request) - len(cached) + self.pages.num_unused(cached)
        return new + self._num_growing() <= self.pages.num_free

    def _num_growing(self, but: Request | None = None) -> int:
        """How many of those that run may still need another page, ``but`` left out."""
        size = self._page_size
        return sum(r.max_length - 1 > len(r.pages) * size for r in self._running if r is not but)

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
            self.prefix_queries += len(request.ids) if self._caching else 0
            self.prefix_hits += request.num_cached

    def _find(self, request: Request) -> list[int]:
        """Cached pages of a request's first tokens; its last token is always read anew, because
        its logits are wanted.
        """
        if not self._caching:
            return []
        size, ids = self._page_size, request.ids
        extend_keys(request.keys, root_key(request.cache_salt), ids, size, len(ids))
        if request.params.prompt_logprobs is not None:
            return []  # its prompt is scored, every row of it
        return self.pages.find(request.keys[: (len(ids) - 1) // size])

    def _is_read_by_another(self, request: Request, num_found: int) -> bool:
        if num_found >= (len(request.ids) - 1) // self._page_size or not self._caching:
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

    def _add_guesses(
        self, chunks: Sequence[Chunk], guess: Guess, grown: list[Request]
    ) -> list[Chunk]:
        """The chunks with guessed ids behind them, where the step's budget and pages allow; adds to
        ``grown`` whoever gets a page for them.
        """
        left = self._budget - sum(chunk.stop - chunk.start for chunk in chunks)
        out = []
        for chunk in chunks:
            request = chunk.request
            # The last new token is never read, so it need not be guessed.
            count = min(left, request.max_length - len(request.ids) - 1)
            if count > 0 and chunk.reaches_end and request.guessable:
                guessed = guess(request, count)
                guessed = guessed[: self._slots_for(request, len(guessed), grown)]
                left -= len(guessed)
                chunk = chunk._replace(guessed=guessed)
            out.append(chunk)
        return out

    def _slots_for(self, request: Request, count: int, grown: list[Request]) -> int:
        """How many of ``count`` ids behind a request's own have slots, and one for the new id
        that follows them: where all are right, the next step needs no page for it.

        Pages are taken for them as long as all others that run can get their next one.
        """
        new = len(request.ids) + 1
        wanted = min(new + count, request.max_length - 1)  # the last id of all needs no slot
        missing = -(-wanted // self._page_size) - len(request.pages)
        if missing > 0:
            spare = self.pages.num_free - self._num_growing(but=request)
            request.pages += self.pages.allocate(max(0, min(missing, spare)))
            grown.append(request)
        held = len(request.pages) * self._page_size
        return count if held >= wanted else max(0, held - new)

    def _keep_right(self, chunk: Chunk) -> None:
        """Of a chunk's guesses, keep in the cache those that became new ids.

        The newest id is in no slot yet: either no guess was there, or a wrong one, or the text has
        ended with it.
        """
        request = chunk.request
        request.num_cached = len(request.ids) - 1
        self.drafts += 1
        self.draft_tokens += len(chunk.guessed)
        self.accepted_tokens += request.num_cached - chunk.stop
        needed = -(-request.num_cached // self._page_size)
        self.pages.free(request.pages[needed:])
        del request.pages[needed:]

    def _pages_for(self, request: Request) -> int:
        return -(-len(request.ids) // self._page_size)


def _order(request: Request) -> tuple[int, int]:
    return request.order
