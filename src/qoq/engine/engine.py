"""Engine: many requests through one decoder over a paged KV cache (QServe section 5.1).

A step runs one batch: the next token of every request that is generating, and as many prompt
chunks of the others as the step's token budget holds. What a request's rows look like, where its
chunks begin and end included, depends on the request alone, so its tokens do not depend on what
else is in the batch.
"""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from qoq.engine.logprobs import forward
from qoq.engine.request import Request, SamplingParams, Update
from qoq.engine.sampler import Sampler
from qoq.errors import RequestError
from qoq.kvcache.allocator import PageAllocator
from qoq.kvcache.pool import KVPool, pages_for_tokens
from qoq.models.batch import Batch
from qoq.models.decoder import Decoder
from qoq.tokenizer import Tokenizer

PREFILL_CHUNK = 512


class Engine:
    """Runs requests to their end, first come, first served.

    A request gets all the pages it may ever need when it is admitted, so nothing that runs is ever
    thrown out; the others wait in line.
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
        backend: str = "auto",
    ) -> None:
        """max_requests run at a time; a step's batch holds max_step_tokens rows, or a bit fewer.

        ``eos_ids`` end a text; ``backend`` is passed on to every op of the decoder, whose weights
        must have been loaded for it.
        """
        self._decoder = decoder
        self._pool = pool
        self._device = pool.layers[0].k_codes.device
        self._allocator = PageAllocator(pool.num_pages)
        self._tokenizer = tokenizer
        self._eos_ids = tuple(eos_ids)
        self._max_requests = max_requests
        self._max_step_tokens = max(max_step_tokens, max_requests + PREFILL_CHUNK)
        self._backend = backend
        self._sampler = Sampler(decoder.config.vocab_size, tokenizer)
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []

    @property
    def unfinished(self) -> int:
        """Requests that wait or run."""
        return len(self._waiting) + len(self._running)

    def add(self, prompt_ids: Sequence[int], params: SamplingParams) -> Request:
        """Put a prompt in line. Raises RequestError where it can never be run."""
        length = check_length(prompt_ids, params, self._decoder.config.max_positions)
        vocab = self._decoder.config.vocab_size
        strange = next((i for i in prompt_ids if not 0 <= i < vocab), None)
        if strange is not None:
            raise RequestError(f"Token id {strange} is outside this model's vocabulary of {vocab}.")
        need = pages_needed(length, self._pool.page_size)
        if need > self._pool.num_pages:
            raise RequestError(
                f"A request of {length} tokens ({len(prompt_ids)} of them the prompt) needs {need} "
                f"KV pages; the cache has {self._pool.num_pages}. Shorten the prompt, lower "
                "max_tokens or give the cache more memory."
            )
        request = Request(
            prompt_ids, params, max_length=length, eos_ids=self._eos_ids, tokenizer=self._tokenizer
        )
        self._sampler.admit(request, self._device)
        self._waiting.append(request)
        return request

    def abort(self, request: Request) -> None:
        """End a request now and free its pages; a finished one is left alone."""
        if request.finish_reason is None:
            request.finish_reason = "abort"
            self._release()

    @torch.inference_mode()
    def step(self) -> list[Update]:
        """One batch through the model: the next token of every request whose prompt is read."""
        self._admit()
        chunks = self._plan()
        if not chunks:
            return []
        batch = self._batch(chunks)
        ready = [at for at, (request, stop) in enumerate(chunks) if stop == len(request.ids)]
        logits = forward(
            self._decoder,
            batch,
            self._pool,
            batch.last_rows[ready],
            chunks,
            backend=self._backend,
        )
        for request, stop in chunks:
            request.num_cached = stop
        updates = self._choose([chunks[at][0] for at in ready], logits)
        self._release()
        return updates

    def _admit(self) -> None:
        """Let waiting requests in, in order, while there is room for the next one."""
        while self._waiting and len(self._running) < self._max_requests:
            request = self._waiting[0]
            need = pages_needed(request.max_length, self._pool.page_size)
            if need > self._allocator.num_free:
                return
            request.pages = self._allocator.allocate(need)
            self._running.append(self._waiting.popleft())

    def _plan(self) -> list[tuple[Request, int]]:
        """Which requests take part in this step, and up to which of its ids each is read.

        Generating requests all take part; prompts do while the token budget lasts. Chunks end at
        multiples of PREFILL_CHUNK, wherever the budget ends.
        """
        chunks = [(r, len(r.ids)) for r in self._running if r.num_new]
        budget = self._max_step_tokens - len(chunks)
        for request in self._running:
            if request.num_new:
                continue
            chunk_end = (request.num_cached // PREFILL_CHUNK + 1) * PREFILL_CHUNK
            stop = min(chunk_end, len(request.ids))
            budget -= stop - request.num_cached
            if budget < 0:
                break
            chunks.append((request, stop))
        return chunks

    def _batch(self, chunks: Sequence[tuple[Request, int]]) -> Batch:
        """The step's rows: each request's ids from what is cached up to its stop."""
        return Batch.build(
            [request.ids[request.num_cached : stop] for request, stop in chunks],
            [request.num_cached for request, _ in chunks],
            [request.pages for request, _ in chunks],
            self._pool.page_size,
            self._device,
        )

    def _choose(self, requests: Sequence[Request], logits: Tensor) -> list[Update]:
        """Sample a token for each request from its row of logits [S, V], and hand it over."""
        return self._sampler.choose(requests, logits)

    def _release(self) -> None:
        """Free the pages of requests that have ended."""
        for request in self._running:
            if request.finish_reason is not None:
                self._allocator.free(request.pages)
                request.pages = []
        self._running = [r for r in self._running if r.finish_reason is None]
        self._waiting = deque(r for r in self._waiting if r.finish_reason is None)


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
