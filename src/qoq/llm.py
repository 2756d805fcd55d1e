"""LLM: text in, text out, without a server (the offline front door)."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from qoq.engine.choices import choices
from qoq.engine.defaults import sampling_defaults, with_defaults
from qoq.engine.engine import Engine, check_length, pages_needed
from qoq.engine.request import Output, Request, SamplingParams, Update
from qoq.engine.speculative import SpeculativeConfig, guesser
from qoq.errors import RequestError, ResourceError
from qoq.kernels.device import choose_device
from qoq.kvcache.budget import MEMORY_FRACTION, PoolShape, memory_at_hand
from qoq.kvcache.pool import pages_for_budget, pages_for_tokens
from qoq.models.load import load_model
from qoq.tokenizer import Tokenizer

PAGE_SIZE = 64
MANY_TOKENS = 2048  # a request is rarely longer, prompt and answer together

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
        enable_prefix_caching: bool = True,
        speculative_config: SpeculativeConfig | Mapping[str, Any] | None = None,
        device: str = "auto",
        enforce_eager: bool = False,
        backend: str = "auto",
    ) -> None:
        """Load a folder or a hub id.

        kv_tokens bounds the tokens whose keys and values are held at a time, all requests
        together (None: what the requests need, within free memory); requests beyond that wait.
        With enable_prefix_caching a prompt that begins like one of an earlier call is not computed
        anew. speculative_config, such as {"method": "ngram", "num_speculative_tokens": 4}, guesses
        tokens: the texts are the same, repetitive ones are there sooner (None: off). device: cpu,
        cuda, cuda:N or auto, which is a GPU if there is one; enforce_eager: no CUDA graphs there.
        Raises RequestError, CheckpointError, SourceError or UnsupportedModelError.
        """
        if kv_tokens is not None and kv_tokens < 1:
            raise RequestError(f"kv_tokens must be 1 or more, not {kv_tokens}.")
        if max_requests < 1:
            raise RequestError(f"max_requests must be 1 or more, not {max_requests}.")
        self._speculative = SpeculativeConfig.of(speculative_config)
        loaded = load_model(model, backend=backend, device=choose_device(device, backend).device)
        self.path = loaded.path
        self.config = loaded.config
        self.scheme = loaded.scheme
        self.tokenizer = Tokenizer.load(loaded.path)
        self.device = loaded.device
        self._decoder = loaded.decoder
        self._eos_ids = self.tokenizer.eos_ids or loaded.config.eos_token_ids
        self._kv_tokens = kv_tokens
        self._max_requests = max_requests
        self._prefix_caching = enable_prefix_caching
        self._enforce_eager = enforce_eager
        self._backend = backend
        self._engine: Engine | None = None
        self._num_pages = 0  # of that engine's cache

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[Output]:
        """Continue each prompt (text, or token ids) and return the outputs in the same order.

        Names are vLLM's. One ``sampling_params`` serves all prompts, or give one for each; where
        its ``n`` is more than 1, a prompt's n outputs follow each other, ``index`` saying which is
        which. ``use_tqdm`` draws a bar on standard error. Raises RequestError before any work if a
        prompt cannot be run. After an interrupt the LLM can be used again.
        """
        ids = [self._encode(prompt) for prompt in _as_list(prompts)]
        if not ids:
            return []
        engine, requests = self._start(ids, _one_each(sampling_params, len(ids)))
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        with Progress(*columns, disable=not use_tqdm, console=Console(stderr=True)) as bar:
            left = sum(request.max_length - len(request.ids) for request in requests)
            task = bar.add_task("generating", total=left)
            own, unfinished = set(map(id, requests)), len(requests)
            while unfinished:
                updates = [u for u in self._step(engine) if id(u.request) in own]
                bar.advance(task, sum(map(_gained, updates)))
                unfinished -= sum(u.request.finish_reason is not None for u in updates)
        return [request.output() for request in requests]

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json asks for, greedy where it says nothing."""
        return with_defaults(sampling_defaults(self.path))

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[Output]:
        """Answer a conversation (messages with "role" and "content"), or several.

        Raises RequestError where the model has no chat template.
        """
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = [messages] if single else messages
        ids = [self.tokenizer.encode_chat(conversation) for conversation in conversations]
        return self.generate(ids, sampling_params, use_tqdm=use_tqdm)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """Continue one prompt, piece by piece; the pieces joined are ``generate``'s text."""
        updates = self.stream_updates(prompt, params)
        return (update.text for update in updates if update.text)

    def stream_updates(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> Iterator[Update]:
        """``stream`` with the new ids, the request they grow, and texts that may be empty."""
        params = params or SamplingParams()
        if params.n != 1:
            raise RequestError(
                "n must be 1 for a stream; ask for each text in a stream of its own."
            )
        engine, [request] = self._start([self._encode(prompt)], [params])

        def updates() -> Iterator[Update]:
            tokens = shown = 0
            try:
                # The request also grows while other streams and calls make the engine step.
                while request.finish_reason is None or tokens < request.num_new:
                    if tokens == request.num_new:
                        self._step(engine)
                    ids, text = tuple(request.token_ids[tokens:]), request.text[shown:]
                    tokens += len(ids)
                    shown += len(text)
                    if ids or text:
                        yield Update(request, ids, text)
            finally:
                engine.abort(request)

        return updates()

    def new_engine(self) -> Engine:
        """An engine for requests that are not known yet, as ``feed.keep_full`` adds.

        Its KV cache holds ``kv_tokens``; by default MANY_TOKENS for each of ``max_requests``, or
        one request as long as the model allows if that is more, as far as free memory goes.
        Raises ResourceError where there is no memory for any.
        """
        longest = pages_needed(self.config.max_positions, PAGE_SIZE)
        usual = min(longest, pages_for_tokens(MANY_TOKENS, PAGE_SIZE))
        return self._engine_for(max(longest, usual * self._max_requests), 1)

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        return [int(i) for i in prompt]

    def _start(
        self, prompts: list[list[int]], params: Sequence[SamplingParams]
    ) -> tuple[Engine, list[Request]]:
        """The engine, with these prompts in line, each as many times as it wants texts."""
        asked = [
            (ids, choice, index)
            for ids, p in zip(prompts, params, strict=True)
            for index, choice in enumerate(choices(p))
        ]
        context = self.config.max_positions
        lengths = [check_length(ids, choice, context) for ids, choice, _ in asked]
        needs = [pages_needed(length, PAGE_SIZE) for length in lengths]
        engine = self._engine_for(sum(sorted(needs)[-self._max_requests :]), max(needs))
        requests: list[Request] = []
        try:
            for ids, choice, index in asked:
                requests.append(engine.add(ids, choice))
                requests[-1].index = index
        except RequestError:
            for request in requests:
                engine.abort(request)
            raise
        return engine, requests

    def _engine_for(self, wanted: int, least: int) -> Engine:
        """The engine of earlier calls if its cache has ``wanted`` pages, else a new one.

        A new cache has as many or, within free memory, at least twice the old one's; ResourceError
        where memory does not hold ``least`` pages.
        """
        limit = None if self._kv_tokens is None else pages_for_tokens(self._kv_tokens, PAGE_SIZE)
        if limit is not None:
            wanted = min(wanted, limit)
        if self._engine is not None and self._num_pages >= wanted:
            return self._engine
        wanted = max(wanted, 2 * self._num_pages)
        self._engine, self._num_pages = None, 0  # its memory is free for the new one
        config, kv = self.config, self.scheme.kv
        sizes = (config.num_layers, config.num_kv_heads, PAGE_SIZE, config.head_dim)
        budget = int(memory_at_hand(self.device) * MEMORY_FRACTION)
        pages = pages_for_budget(budget, kv, *sizes)
        if pages < least:
            raise ResourceError(
                f"The longest request needs {least * PAGE_SIZE} tokens of KV cache; the free "
                f"memory holds {pages * PAGE_SIZE}. Lower max_tokens or free some memory."
            )
        pages = min(pages, wanted if limit is None else min(wanted, limit))
        self._engine = Engine(
            self._decoder,
            PoolShape(kv, *sizes).pool(pages, self.device),
            tokenizer=self.tokenizer,
            eos_ids=self._eos_ids,
            max_requests=self._max_requests,
            enable_prefix_caching=self._prefix_caching,
            guess=guesser(self._speculative),
            enforce_eager=self._enforce_eager,
            backend=self._backend,
        )
        self._num_pages = pages
        return self._engine

    def _step(self, engine: Engine) -> list[Update]:
        """One step. An engine that was interrupted in the midst of one is not used again."""
        try:
            return engine.step()
        except BaseException:
            if self._engine is engine:
                self._engine, self._num_pages = None, 0
            raise


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, told apart: text and a list of ids are one."""
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _gained(update: Update) -> int:
    """Tokens of progress: new ones, and all that an early end makes needless."""
    request = update.request
    needless = 0 if request.finish_reason is None else request.max_length - len(request.ids)
    return len(update.token_ids) + needless


def _one_each(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> Sequence[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise RequestError(f"{len(params)} sampling parameters for {count} prompts; give one each.")
    return params
