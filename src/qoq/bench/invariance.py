"""Batch invariance, tried: the same requests in other company must give the same bits.

Each request first runs alone, its prompt read in one piece, nothing cached. Then again in batches
with random neighbours, cut into chunks, with a warm prefix cache, thrown out and read again, and
with the next tokens guessed, rightly and wrongly. Every token and every log-probability must be
equal, to the bit.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from qoq.engine.engine import Engine
from qoq.engine.request import Request, SamplingParams
from qoq.formats.scheme import KVFormat
from qoq.kvcache.budget import PoolShape
from qoq.kvcache.pool import pages_for_tokens
from qoq.models.decoder import Decoder

BATCHES = (2, 3, 8, 17, 64)
CHUNKS = (2, 16, 33, 100, 257)
GUESSES = 5
LENGTHS = (1, 16, 37, 130, 300, 530)
PAGE_SIZE = 16


@dataclass(frozen=True)
class Asked:
    """One request to compare: its prompt and how its tokens are chosen."""

    prompt: list[int]
    params: SamplingParams


@dataclass(frozen=True)
class Trial:
    """One way of running the requests: how many answers were compared, and how many differed.

    cached_tokens, preemptions, draft_tokens and accepted_tokens tell that the way was really taken.
    """

    name: str
    comparisons: int
    mismatches: int
    cached_tokens: int = 0
    preemptions: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Invariance:
    """The trials of one decoder. ``backend`` must be the one its weights were laid out for."""

    def __init__(
        self,
        decoder: Decoder,
        kv: KVFormat,
        *,
        backend: str = "auto",
        lengths: Sequence[int] = LENGTHS,
        new_tokens: int = 24,
        seed: int = 0,
    ) -> None:
        """Prompts of ``lengths`` random tokens (cut to the model's context), every other request
        sampled; neighbours are random too.
        """
        self._decoder, self._backend = decoder, backend
        self._draw = random.Random(seed)
        self._context = decoder.config.max_positions
        config = decoder.config
        self._shape = PoolShape(
            kv, config.num_layers, config.num_kv_heads, PAGE_SIZE, config.head_dim
        )
        sampled: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "top_k": 50}
        self._asked = [
            Asked(
                self._random_ids(min(length, self._context - new_tokens)),
                SamplingParams(
                    max_tokens=new_tokens, ignore_eos=True, seed=i, **(sampled if i % 2 else {})
                ),
            )
            for i, length in enumerate(lengths)
        ]
        self._truth: list[Request] = []

    def trials(
        self, batches: Sequence[int] = BATCHES, chunks: Sequence[int] = CHUNKS
    ) -> Iterator[Trial]:
        """Run all trials; each is yielded when it is done."""
        self._truth = [self._run([asked])[0][0] for asked in self._asked]
        for size in batches:
            yield self._batch(size)
        for tokens in chunks:
            yield self._trial(f"prompts in chunks of {tokens}", self._chunked(tokens))
        yield self._trial("warm prefix cache", self._warm())
        yield self._trial("thrown out at random", self._preempted())
        yield self._trial("cache too small", self._crowded())
        yield self._trial("guesses, right and wrong", self._guessed())

    def _random_ids(self, count: int) -> list[int]:
        return [self._draw.randrange(self._decoder.config.vocab_size) for _ in range(count)]

    def _engine(
        self, asked: Sequence[Asked], num_pages: int | None = None, **options: Any
    ) -> Engine:
        need = sum(pages_for_tokens(len(a.prompt) + a.params.max_tokens, PAGE_SIZE) for a in asked)
        pool = self._shape.pool(
            need if num_pages is None else num_pages, self._decoder.embed.device
        )
        options = {"max_requests": len(asked), "max_step_tokens": 1 << 20, **options}
        return Engine(self._decoder, pool, backend=self._backend, **options)

    def _run(
        self,
        asked: Sequence[Asked],
        engine: Engine | None = None,
        between: Callable[[Engine, Sequence[Request]], None] = lambda engine, requests: None,
    ) -> tuple[list[Request], Engine]:
        """The finished requests; ``between`` is called after each step."""
        engine = engine or self._engine(asked)
        requests = [engine.add(a.prompt, a.params) for a in asked]
        while engine.unfinished:
            engine.step()
            between(engine, requests)
        return requests, engine

    def _trial(self, name: str, done: tuple[list[Request], Engine]) -> Trial:
        """Compare the first requests of a run with the truth, in order."""
        requests, engine = done
        stats = engine.stats()
        pairs = list(zip(requests, self._truth, strict=True))
        return Trial(
            name,
            len(pairs),
            sum(_differ(got, want) for got, want in pairs),
            sum(request.num_cached_prompt_tokens for request in requests),
            stats.preemptions,
            stats.draft_tokens,
            stats.accepted_tokens,
        )

    def _batch(self, size: int) -> Trial:
        """Every request in a batch of ``size``, at a random place among random neighbours."""
        trial = Trial(f"batches of {size}", 0, 0)
        for first in range(0, len(self._asked), size):
            own = list(range(first, min(first + size, len(self._asked))))
            batch: list[tuple[int, Asked]] = [(i, self._asked[i]) for i in own]
            batch += [(-1, self._neighbour()) for _ in range(size - len(own))]
            self._draw.shuffle(batch)
            requests, _ = self._run([asked for _, asked in batch])
            pairs = [
                (r, self._truth[i]) for (i, _), r in zip(batch, requests, strict=True) if i >= 0
            ]
            trial = replace(
                trial,
                comparisons=trial.comparisons + len(pairs),
                mismatches=trial.mismatches + sum(_differ(got, want) for got, want in pairs),
            )
        return trial

    def _neighbour(self) -> Asked:
        new = self._draw.randint(1, 12)
        length = self._draw.randint(1, min(90, self._context - new))
        params = SamplingParams(
            max_tokens=new, ignore_eos=True, temperature=self._draw.choice([0.0, 1.5])
        )
        return Asked(self._random_ids(length), params)

    def _chunked(self, tokens: int) -> tuple[list[Request], Engine]:
        """One request at a time, ``tokens`` of its prompt a step (2 at least)."""
        engine = self._engine(self._asked, max_requests=1, max_step_tokens=tokens)
        return self._run(self._asked, engine)

    def _warm(self) -> tuple[list[Request], Engine]:
        """All requests a second time, after the same engine has answered them once."""
        engine = self._engine([*self._asked, *self._asked], max_step_tokens=200)
        self._run(self._asked, engine)
        return self._run(self._asked, engine)

    def _preempted(self) -> tuple[list[Request], Engine]:
        """Whoever runs may be thrown out after any step."""

        def between(engine: Engine, requests: Sequence[Request]) -> None:
            for request in requests:
                if self._draw.random() < 0.1:
                    engine.preempt(request)

        # Without prefix caching, or what was thrown out would be found again and not recomputed.
        engine = self._engine(self._asked, max_step_tokens=150, enable_prefix_caching=False)
        return self._run(self._asked, engine, between)

    def _crowded(self) -> tuple[list[Request], Engine]:
        """Pages that let all but one in, and do not last for what they then generate."""
        prompts = sorted(pages_for_tokens(len(a.prompt), PAGE_SIZE) for a in self._asked)
        longest = max(len(a.prompt) + a.params.max_tokens for a in self._asked)
        least = pages_for_tokens(longest, PAGE_SIZE)
        pages = max(least, sum(prompts[:-1]) + len(prompts) - 2)
        return self._run(self._asked, self._engine(self._asked, pages))

    def _guessed(self) -> tuple[list[Request], Engine]:
        """All requests at once; what each is about to write is guessed, now and then wrongly."""
        written = {request.seed: request.token_ids for request in self._truth}

        def guess(request: Request, count: int) -> list[int]:
            ids = written[request.seed][request.num_new :][: min(count, GUESSES)]
            if ids and self._draw.random() < 0.5:
                ids[self._draw.randrange(len(ids))] = self._random_ids(1)[0]
            return ids

        return self._run(self._asked, self._engine(self._asked, guess=guess))


def _differ(got: Request, want: Request) -> bool:
    return got.token_ids != want.token_ids or got.logprobs != want.logprobs
