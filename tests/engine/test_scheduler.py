"""Scheduler and allocator as a state machine, without torch: no page is leaked, used twice or read
with another's tokens in it, and every request ends.
"""

import ast
import importlib
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from qoq.engine.plan import Chunk
from qoq.engine.request import Request, SamplingParams
from qoq.engine.scheduler import Scheduler

PARAMS = SamplingParams()
UNGUESSABLE = SamplingParams(presence_penalty=1.0)
MOST_GUESSES = 4


class Serving(RuleBasedStateMachine):
    """Random arrivals, ends, aborts, preemptions and guesses over pages whose content is modelled.

    All requests write the same tokens in a step; each is guessed a number of them, one of them
    wrongly perhaps.
    """

    @initialize(
        num_pages=st.integers(1, 12),
        page_size=st.integers(1, 5),
        max_requests=st.integers(1, 5),
        max_step_tokens=st.integers(1, 30),
        caching=st.booleans(),
    )
    def start(
        self,
        num_pages: int,
        page_size: int,
        max_requests: int,
        max_step_tokens: int,
        caching: bool,
    ) -> None:
        self.num_pages, self.page_size, self.max_requests = num_pages, page_size, max_requests
        self.max_step_tokens = max_step_tokens
        self.caching = caching
        self.scheduler = Scheduler(
            num_pages,
            page_size,
            max_requests=max_requests,
            max_step_tokens=max_step_tokens,
            enable_prefix_caching=caching,
            guess=self.guess,
        )
        self.content: dict[int, int] = {}  # slot -> token
        self.live: list[Request] = []
        self.ended: list[Request] = []

    @rule(
        data=st.data(),
        alphabet=st.integers(1, 2),
        priority=st.integers(-1, 1),
        salt=st.sampled_from(["", "", "a"]),
        copies=st.integers(1, 3),
        params=st.sampled_from([PARAMS, PARAMS, UNGUESSABLE]),
    )
    def arrive(
        self,
        data: st.DataObject,
        alphabet: int,
        priority: int,
        salt: str,
        copies: int,
        params: SamplingParams,
    ) -> None:
        # A request that ends with n tokens has n - 1 in the cache.
        room = self.num_pages * self.page_size + 1
        prompt = data.draw(st.lists(st.integers(0, alphabet), min_size=1, max_size=room - 1))
        new = data.draw(st.integers(1, room - len(prompt)))
        for _ in range(copies):
            request = Request(
                prompt,
                params,
                max_length=len(prompt) + new,
                priority=priority,
                cache_salt=salt,
            )
            self.scheduler.add(request)
            self.live.append(request)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.live))
        self.end(request)
        self.scheduler.release(request)  # a second time changes nothing

    @precondition(lambda self: self.scheduler.num_running)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        self.scheduler.preempt(data.draw(st.sampled_from(self.scheduler.running)))

    @rule(
        tokens=st.lists(st.integers(0, 2), min_size=MOST_GUESSES + 1, max_size=MOST_GUESSES + 1),
        guesses=st.lists(
            st.tuples(st.integers(0, MOST_GUESSES), st.integers(0, MOST_GUESSES)),
            min_size=1,
            max_size=3,
        ),
    )
    def step(self, tokens: list[int], guesses: list[tuple[int, int]]) -> None:
        self.tokens, self.guesses = tokens, guesses
        plan = self.scheduler.plan()
        assert bool(plan.chunks) == bool(self.live)
        self.check_plan(plan.chunks)
        written = set()
        for request, begin, stop, guessed in plan.chunks:
            held = [self.content.get(self.slot(request, at)) for at in range(begin)]
            assert held == request.ids[:begin], "what counts as cached is not its own text"
            for at, token in enumerate([*request.ids[begin:stop], *guessed], begin):
                slot = self.slot(request, at)
                assert slot not in written, "two rows write one slot"
                assert self.scheduler.pages.users(slot // self.page_size) == 1
                written.add(slot)
                self.content[slot] = token
        running = [request for request in self.live if request.row >= 0]
        taken = any(self.missing(request) < 0 for request in running)
        accepted = self.scheduler.accepted_tokens
        for chunk in plan.chunks:
            if chunk.reaches_end:
                accepted += self.accept(chunk)
        self.scheduler.advance(plan.chunks)
        assert self.scheduler.accepted_tokens == accepted
        if taken:
            going_on = [r for r in running if len(r.ids) < r.max_length]
            missing = sum(self.missing(request) for request in going_on)
            assert missing <= self.scheduler.pages.num_free, "guesses cost another its next page"
        for chunk in plan.chunks:
            if len(chunk.request.ids) == chunk.request.max_length:
                self.end(chunk.request)

    def missing(self, request: Request) -> int:
        """Pages that it needs for all its ids and does not have."""
        return -(-len(request.ids) // self.page_size) - len(request.pages)

    def guess(self, request: Request, count: int) -> list[int]:
        many, wrong = self.guesses[request.order[1] % len(self.guesses)]
        ids = self.tokens[: min(many, count)]
        return [(i + 1) % 3 if at == wrong else i for at, i in enumerate(ids)]

    def accept(self, chunk: Chunk) -> int:
        """Give a request its tokens; how many of them were guessed right."""
        for at, guess in enumerate((*chunk.guessed, None)):
            chunk.request.ids.append(self.tokens[at])
            if self.tokens[at] != guess:
                break
        return at

    def slot(self, request: Request, at: int) -> int:
        return request.pages[at // self.page_size] * self.page_size + at % self.page_size

    def end(self, request: Request) -> None:
        request.finish_reason = "length"
        self.scheduler.release(request)
        self.live.remove(request)
        self.ended.append(request)

    def check_plan(self, chunks: list[Chunk]) -> None:
        running = [request for request in self.live if request.row >= 0]
        sizes = [chunk.stop - chunk.start + len(chunk.guessed) for chunk in chunks]
        assert len({id(chunk.request) for chunk in chunks}) == len(chunks)
        assert all(size > 0 for size in sizes)
        assert sum(sizes) <= max(self.max_step_tokens, self.max_requests + 1)
        for request, begin, stop, guessed in chunks:
            assert request in running
            assert (begin, stop <= len(request.ids)) == (request.num_cached, True)
            longest = -(-max(request.max_length - 1, 1) // self.page_size)
            assert len(request.pages) <= longest
            if guessed:
                assert request.params is PARAMS
                assert stop == len(request.ids)
                assert stop + len(guessed) < request.max_length
        parts = {id(chunk.request) for chunk in chunks}
        generating = [r for r in running if len(r.ids) - r.num_cached == 1]
        assert all(id(request) in parts for request in generating)
        if running:  # the first in line always gets on
            assert id(min(running, key=lambda r: r.order)) in parts

    @invariant()
    def pages_are_counted_right(self) -> None:
        pages = self.scheduler.pages
        held = Counter(page for request in self.live for page in request.pages)
        for page in range(self.num_pages):
            assert pages.users(page) == held[page]
        assert pages.num_used == len(held)
        assert pages.num_used + pages.num_free == self.num_pages
        for request in [*self.live, *self.ended]:
            assert len(set(request.pages)) == len(request.pages)
            if request.row < 0:
                assert request.pages == []
            assert self.missing(request) >= 0 or request.row < 0, "a guess's page outlives it"

    @invariant()
    def rows_are_counted_right(self) -> None:
        running = [request for request in self.live if request.row >= 0]
        rows = [request.row for request in running]
        assert len(set(rows)) == len(rows) <= self.max_requests
        assert self.scheduler.num_running == len(running)
        assert self.scheduler.num_waiting == len(self.live) - len(running)
        orders = [request.order for request in self.scheduler.running]
        assert orders == sorted(orders)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        most = sum(request.max_length for request in self.live) * (1 + len(self.live))
        for _ in range(most):
            self.step([0] * (MOST_GUESSES + 1), [(MOST_GUESSES, 2), (2, MOST_GUESSES)])
        assert not self.live, "a request never ends"
        assert self.scheduler.pages.num_used == 0
        assert not self.scheduler._reading
        assert len(self.scheduler._rows) == self.max_requests
        assert sorted(self.scheduler.pages.allocate(self.num_pages)) == list(range(self.num_pages))


Serving.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestServing = Serving.TestCase


def scheduler(num_pages: int = 100, **options: int) -> Scheduler:
    options = {"max_requests": 4, "max_step_tokens": 64, **options}
    return Scheduler(num_pages, 4, **options)  # type: ignore[arg-type]


def request(prompt: list[int], max_length: int = 50, priority: int = 0) -> Request:
    return Request(prompt, PARAMS, max_length=max_length, priority=priority)


def test_who_is_thrown_out_comes_back_before_those_behind_it() -> None:
    line = scheduler(max_requests=2)
    first, second, third = (request([i] * 6) for i in range(3))
    for one in (first, second, third):
        line.add(one)
    line.plan()
    line.preempt(second)
    assert line.num_waiting == 2
    line.plan()
    assert [r.row >= 0 for r in (first, second, third)] == [True, True, False]


def test_pages_for_all_at_their_longest_let_all_in_at_once() -> None:
    lengths = [5, 9, 13, 17]
    line = scheduler(num_pages=sum(-(-(n - 1) // 4) for n in lengths))
    for n in lengths:
        line.add(request([n] * (n - 1), max_length=n))
    assert len(line.plan().chunks) == 4


def test_a_line_of_aborted_requests_does_not_grow_for_ever() -> None:
    line = scheduler(max_requests=1)
    line.add(request([1]))
    line.plan()
    for i in range(5000):
        one = request([i], priority=i % 3)
        line.add(one)
        one.finish_reason = "abort"
        line.release(one)
    assert line.num_waiting == 0
    assert len(line._line._heap) < 200


def test_a_prompt_that_is_being_read_is_shared_once_it_is_read() -> None:
    line = scheduler(max_step_tokens=8)
    prompt = list(range(20))
    for _ in range(3):
        line.add(request(prompt))
    other = request([7, 7])
    line.add(other)
    steps = []
    for _ in range(3):
        plan = line.plan()
        steps.append([(c.request.order[1], c.start, c.stop) for c in plan.chunks])
        line.advance(plan.chunks)
    assert steps[0] == [(0, 0, 6), (3, 0, 2)]  # the others wait, the one behind them passes
    assert [order for step in steps[:2] for order, _, _ in step].count(1) == 0
    plan = line.plan()
    assert {c.start for c in plan.chunks if c.request.order[1] in (1, 2)} == {16}
    assert other.row >= 0


@pytest.mark.parametrize(
    "module",
    [f"engine.{name}" for name in ("scheduler", "plan", "line", "request", "speculative")]
    + ["kvcache.prefix"],
)
def test_policy_without_tensors(module: str) -> None:
    file = Path(str(importlib.import_module(f"qoq.{module}").__file__))
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    imports = " ".join(ast.unparse(n) for n in nodes if isinstance(n, ast.Import | ast.ImportFrom))
    assert "torch" not in imports
    assert "numpy" not in imports
