"""LLM: text in, text out, without a server (the offline front door)."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from qoq.engine.choices import choices
from qoq.engine.defaults import sampling_defaults, with_defaults
from qoq.engine.engine import Engine, check_length, pages_needed
from qoq.engine.request import Output, Request, SamplingParams, Update
from qoq.errors import RequestError, ResourceError
from qoq.kvcache.pool import KVPool, pages_for_budget, pages_for_tokens
from qoq.models.load import load_model
from qoq.tokenizer import Tokenizer

PAGE_SIZE = 64
MEMORY_SHARE = 0.8  # of the memory that is free when a generation starts

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]


class LLM:
    """A packed checkpoint or a float model, ready to generate.

    >>> llm = LLM("demo-out/books-llama-w4a8kv4-g128")
    >>> llm.generate("It was a dark", SamplingParams(max_tokens=8))[0].text
    """

    def __init__(
        self,
        model: str | Path,
        *,
        kv_tokens: int | None = None,
        max_requests: int = 64,
        backend: str = "auto",
    ) -> None:
        """Load a folder or a hub id.

        kv_tokens bounds the tokens whose keys and values are held at a time, all requests
        together (None: what the requests need, within free memory); requests beyond that wait.
        Raises CheckpointError, SourceError or UnsupportedModelError.
        """
        if kv_tokens is not None and kv_tokens < 1:
            raise RequestError(f"kv_tokens must be 1 or more, not {kv_tokens}.")
        if max_requests < 1:
            raise RequestError(f"max_requests must be 1 or more, not {max_requests}.")
        loaded = load_model(model, backend=backend)
        self.path = loaded.path
        self.config = loaded.config
        self.scheme = loaded.scheme
        self.tokenizer = Tokenizer.load(loaded.path)
        self._decoder = loaded.decoder
        self._eos_ids = self.tokenizer.eos_ids or loaded.config.eos_token_ids
        self._kv_tokens = kv_tokens
        self._max_requests = max_requests
        self._backend = backend

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[Output]:
        """Continue each prompt (text, or token ids) and return the outputs in the same order.

        Where ``params.n`` is more than 1, a prompt's n outputs follow each other, ``index`` saying
        which is which. One ``params`` serves all prompts, or give one for each; ``progress`` draws
        a bar on standard error. Raises RequestError before any work if a prompt cannot be run.
        After an interrupt the LLM can be used again.
        """
        ids = [self._encode(prompt) for prompt in _as_list(prompts)]
        if not ids:
            return []
        engine, requests = self._start(ids, _one_each(params, len(ids)))
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, disable=not progress, console=Console(stderr=True)) as bar:
            left = sum(request.max_length - len(request.ids) for request in requests)
            task = bar.add_task("generating", total=left)
            while engine.unfinished:
                bar.advance(task, sum(map(_gained, engine.step())))
        return [request.output() for request in requests]

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json asks for, greedy where it says nothing."""
        return with_defaults(sampling_defaults(self.path))

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[Output]:
        """Answer a conversation (messages with "role" and "content"), or several.

        Raises RequestError where the model has no chat template.
        """
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = [messages] if single else messages
        ids = [self.tokenizer.encode_chat(conversation) for conversation in conversations]
        return self.generate(ids, params, progress=progress)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """Continue one prompt, piece by piece; the pieces joined are ``generate``'s text."""
        params = params or SamplingParams()
        if params.n != 1:
            raise RequestError(
                "n must be 1 for a stream; ask for each text in a stream of its own."
            )
        engine, _ = self._start([self._encode(prompt)], [params])

        def pieces() -> Iterator[str]:
            while engine.unfinished:
                yield from (update.text for update in engine.step() if update.text)

        return pieces()

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        return [int(i) for i in prompt]

    def _start(
        self, prompts: list[list[int]], params: Sequence[SamplingParams]
    ) -> tuple[Engine, list[Request]]:
        """An engine of its own for these prompts, with a KV cache just big enough.

        A prompt has as many requests as choices, in order.
        """
        asked = [
            (ids, choice, index)
            for ids, p in zip(prompts, params, strict=True)
            for index, choice in enumerate(choices(p))
        ]
        context = self.config.max_positions
        lengths = [check_length(ids, choice, context) for ids, choice, _ in asked]
        needs = [pages_needed(length, PAGE_SIZE) for length in lengths]
        pool = self._pool(sum(sorted(needs)[-self._max_requests :]), max(needs))
        engine = Engine(
            self._decoder,
            pool,
            tokenizer=self.tokenizer,
            eos_ids=self._eos_ids,
            max_requests=self._max_requests,
            backend=self._backend,
        )
        requests = []
        for ids, choice, index in asked:
            requests.append(engine.add(ids, choice))
            requests[-1].index = index
        return engine, requests

    def _pool(self, wanted: int, least: int) -> KVPool:
        """A cache of ``wanted`` pages, or of what memory allows, but of ``least`` pages."""
        config, kv = self.config, self.scheme.kv
        shape = (config.num_layers, config.num_kv_heads, PAGE_SIZE, config.head_dim)
        free = int(psutil.virtual_memory().available * MEMORY_SHARE)
        pages = min(wanted, pages_for_budget(free, kv, *shape))
        if pages < least:
            raise ResourceError(
                f"The longest request needs {least * PAGE_SIZE} tokens of KV cache; the free "
                f"memory holds {pages * PAGE_SIZE}. Lower max_tokens or free some memory."
            )
        if self._kv_tokens is not None:
            pages = min(pages, pages_for_tokens(self._kv_tokens, PAGE_SIZE))
        return KVPool(
            kv,
            num_layers=config.num_layers,
            num_pages=pages,
            num_kv_heads=config.num_kv_heads,
            page_size=PAGE_SIZE,
            head_dim=config.head_dim,
        )


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, told apart: text and a list of ids are one."""
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _gained(update: Update) -> int:
    """Steps of progress: one token, or all that an early end makes needless."""
    request = update.request
    return 1 if request.finish_reason is None else 1 + request.max_length - len(request.ids)


def _one_each(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> Sequence[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise RequestError(f"{len(params)} sampling parameters for {count} prompts; give one each.")
    return params
