"""Engine: many requests through one decoder over a paged KV cache (QServe section 5.1).

A step runs one batch: the next token of every request that is generating, and as many tokens of
prompts as its budget holds. Kernels compute a row from its own sequence alone, so a request's
tokens do not depend on what else is in the batch, on where its prompt is cut into chunks, on
cached prefixes or on being thrown out and read again (docs/numerics.md).
"""

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from qoq.engine.logprobs import forward, log_sums, unscored
from qoq.engine.plan import Chunk
from qoq.engine.request import Request, SamplingParams, Update
from qoq.engine.rows import Rows
from qoq.engine.sampler import Sampler
from qoq.engine.scheduler import Guess, Scheduler
from qoq.engine.stats import EngineStats
from qoq.engine.structured import Grammars
from qoq.errors import RequestError
from qoq.kvcache.pool import KVPool, pages_for_tokens
from qoq.models.batch import BatchShape
from qoq.models.decoder import Decoder
from qoq.models.graphs import DecodeGraphs, Progress, prompt_sizes, recorder
from qoq.tokenizer import Tokenizer


class Engine:
    """Runs requests to their end, by priority, then first come, first served.

    Not for several threads at once: whoever calls ``step`` also calls ``add`` and ``abort``;
    ``stats`` may be called by anyone.
    """

    def __init__(
        self,
        decoder: Decoder,
        pool: KVPool,
        *,
        tokenizer: Tokenizer | None = None,
        eos_ids: Sequence[int] = (),
        max_requests: int = 64,
        max_step_tokens: int = 2048,
        max_model_len: int | None = None,
        enable_prefix_caching: bool = True,
        guess: Guess | None = None,
        enforce_eager: bool = False,
        backend: str = "auto",
    ) -> None:
        """max_requests run at a time; a step reads max_step_tokens tokens, prompts' and new ones
        (or a few more where that is not even one for each request).

        ``eos_ids`` end a text; max_model_len bounds prompt and new tokens together (None: the
        model's context); with enable_prefix_caching a prompt that begins like an earlier one is not
        computed anew; ``guess(request, count)`` gives ids, ``count`` at most, that may follow a
        request's own: right or wrong, they change no token (see ``speculative``); on a GPU, decode
        steps are recorded and replayed unless enforce_eager (see ``graphs``); ``backend`` is passed
        on to every op of the decoder, whose weights must have been loaded for it.
        """
        context = decoder.config.max_positions
        if max_model_len is not None and not 2 <= max_model_len <= context:
            raise RequestError(
                f"max_model_len must be from 2 to this model's context of {context} tokens, not "
                f"{max_model_len}."
            )
        self.max_model_len = max_model_len or context
        self.max_requests = max_requests
        self.enable_prefix_caching = enable_prefix_caching
        self._decoder = decoder
        self._pool = pool
        self._tokenizer = tokenizer
        self._eos_ids = tuple(eos_ids)
        self._backend = backend
        self._device = device = pool.layers[0].k_codes.device
        self._sampler = Sampler(decoder.config.vocab_size, tokenizer)
        most_pages = min(pool.num_pages, pages_needed(self.max_model_len, pool.page_size))
        self._most_pages, self._max_step_tokens = most_pages, max_step_tokens
        self._rows = Rows(max_requests, most_pages, pool.page_size, device)
        record = None if enforce_eager or backend == "oracle" else recorder(device)
        self._graphs: DecodeGraphs | None = None
        if record is not None:
            self._graphs = DecodeGraphs(
                lambda batch: decoder(batch, pool.layers, backend=backend),
                max_requests,
                most_pages,
                device,
                record,
            )
        self._scheduler = Scheduler(
            pool.num_pages,
            pool.page_size,
            max_requests=max_requests,
            max_step_tokens=max_step_tokens,
            enable_prefix_caching=enable_prefix_caching,
            guess=guess,
        )
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._steps = 0
        self._step_tokens = 0
        self._finished: Counter[str] = Counter()

    @property
    def unfinished(self) -> int:
        """Requests that wait or run."""
        return self._scheduler.num_waiting + self._scheduler.num_running

    @property
    def grammars(self) -> Grammars:
        """What compiles structured outputs. Any thread may have it do so ahead of ``add``, which
        else takes as long as that takes.
        """
        return self._sampler.rules.grammars

    def add(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> Request:
        """Put a prompt in line. Raises RequestError where it can never be run.

        Lower ``priority`` is served first. Prompts share cached prefixes only with prompts of the
        same ``cache_salt``.
        """
        length = check_length(prompt_ids, params, self.max_model_len)
        vocab = self._decoder.config.vocab_size
        if min(prompt_ids) < 0 or max(prompt_ids) >= vocab:
            strange = next(i for i in prompt_ids if not 0 <= i < vocab)
            raise RequestError(f"Token id {strange} is outside this model's vocabulary of {vocab}.")
        need = pages_needed(length, self._pool.page_size)
        if need > self._pool.num_pages:
            raise RequestError(
                f"A request of {length} tokens ({len(prompt_ids)} of them the prompt) needs {need} "
                f"KV pages; the cache has {self._pool.num_pages}. Shorten the prompt, lower "
                "max_tokens or give the cache more memory."
            )
        request = Request(
            prompt_ids,
            params,
            max_length=length,
            eos_ids=self._eos_ids,
            tokenizer=self._tokenizer,
            priority=priority,
            cache_salt=cache_salt,
        )
        self._sampler.admit(request, self._device)
        self._scheduler.add(request)
        return request

    def abort(self, request: Request) -> None:
        """End a request now and free its pages; a finished one is left alone."""
        if request.finish_reason is None:
            request.finish_reason = "abort"
            self._end(request, time.monotonic())

    def preempt(self, request: Request) -> None:
        """Throw out a running request, as if the cache were full: it is read again later."""
        if request.row >= 0:
            self._scheduler.preempt(request)

    @torch.inference_mode()
    def record(self, progress: Progress = lambda done, total: None) -> None:
        """Record all sizes of decode steps now, and compile what prompts need, so that none waits
        for it later; on a GPU alone.
        """
        if self._graphs is not None:
            with _on(self._device):
                self._graphs.record_all(progress)
                self._compile()

    @torch.inference_mode()
    def step(self) -> list[Update]:
        """One batch through the model: the next token of every request whose prompt is read, and
        as many more as were guessed right.
        """
        with _on(self._device):
            return self._one_step()

    def _one_step(self) -> list[Update]:
        plan = self._scheduler.plan()
        self._step_tokens = 0
        if not plan.chunks:
            return []
        now = time.monotonic()
        for request in plan.admitted:
            request.admitted_at = request.admitted_at or now  # not anew after a preemption
        self._rows.follow(plan)
        self._step_tokens = sum(chunk.num_rows for chunk in plan.chunks)
        ending, rows = self._rows.next_rows(plan.chunks)
        logits = self._logits(plan.chunks, rows)
        updates = self._sampler.choose(ending, logits, self._rows.sampling(ending))
        self._scheduler.advance(plan.chunks)
        self._steps += 1
        self._settle(updates)
        return updates

    def stats(self) -> EngineStats:
        """What runs, waits and has been done until now."""
        scheduler = self._scheduler
        return EngineStats(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            kv_pages_used=scheduler.pages.num_used,
            kv_pages_total=scheduler.pages.num_pages,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            drafts=scheduler.drafts,
            draft_tokens=scheduler.draft_tokens,
            accepted_tokens=scheduler.accepted_tokens,
            preemptions=scheduler.preemptions,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            steps=self._steps,
            step_tokens=self._step_tokens,
            finished=dict(self._finished),
        )

    def _logits(self, chunks: Sequence[Chunk], rows: Sequence[int]) -> Tensor:
        """fp32 [len(rows), V] at these rows of the chunks' batch."""
        decoding = len(chunks) == len(rows) == self._step_tokens
        if self._graphs is not None and decoding and not any(unscored(c.request) for c in chunks):
            shape = self._graphs.shape(len(chunks), self._rows.pages(chunks))
            if shape is not None:
                logits = self._graphs.run(shape, lambda batch: self._rows.fill(batch, chunks))
                return logits[: len(rows)]
        batch = self._rows.batch(chunks)
        return forward(self._decoder, batch, self._pool, rows, chunks, backend=self._backend)

    def _compile(self) -> None:
        """Read prompts that are nothing but padding, and draw what comes next."""
        row = torch.zeros(1, dtype=torch.int64, device=self._device)
        for tokens in prompt_sizes(self._max_step_tokens):
            for pages in (1, self._most_pages):
                shape = BatchShape(tokens, 1, pages)
                batch = shape.views(shape.padding().to(self._device))
                log_sums(self._decoder(batch, self._pool.layers, row, backend=self._backend))

    def _settle(self, updates: Sequence[Update]) -> None:
        """Count the new tokens, and let those requests go that have ended."""
        now = time.monotonic()
        for update in updates:
            request = update.request
            if request.first_token_time is None:
                request.first_token_time = now
                self._prompt_tokens += len(request.prompt_ids)
            self._generation_tokens += len(update.token_ids)
            if request.finish_reason is not None:
                self._end(request, now)

    def _end(self, request: Request, now: float) -> None:
        """A request's ``finish_reason`` is set: free what it holds and count it."""
        request.finish_time = now
        self._finished[str(request.finish_reason)] += 1
        self._scheduler.release(request)


def _on(device: torch.device) -> AbstractContextManager[None]:
    """Inside, a GPU is the calling thread's current one, where kernels are launched."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def check_length(prompt_ids: Sequence[int], params: SamplingParams, context: int) -> int:
    """Tokens a request may come to, prompt included: at most the model's ``context``.

    Raises RequestError for an empty prompt and for one that leaves no room for a new token.
    """
    if not prompt_ids:
        raise RequestError("The prompt is empty; it must have at least one token.")
    if len(prompt_ids) >= context:
        raise RequestError(
            f"The prompt has {len(prompt_ids)} tokens; this model's context is {context}, new "
            "tokens included. Shorten the prompt."
        )
    return min(len(prompt_ids) + params.max_tokens, context)


def pages_needed(length: int, page_size: int) -> int:
    """KV pages of a request that ends with ``length`` tokens (its last token is never cached)."""
    return pages_for_tokens(max(length - 1, 1), page_size)
