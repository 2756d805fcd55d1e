"""ServedModel: a checkpoint with all that serving it takes, loaded once at start."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from qoq.api.calling import ToolCalling, check_parser
from qoq.api.sampling import sampling_defaults
from qoq.engine.engine import Engine
from qoq.engine.speculative import SpeculativeConfig, guesser
from qoq.errors import RequestError, ResourceError
from qoq.formats.scheme import QuantScheme
from qoq.kernels.device import choose_device
from qoq.kvcache.budget import MEMORY_FRACTION, PoolShape, memory_at_hand
from qoq.kvcache.pool import KVPool, pages_for_tokens
from qoq.models.config import ModelConfig
from qoq.models.load import load_model
from qoq.tokenizer import ChatTemplate, Tokenizer

PAGE_SIZE = 64
_LOG = logging.getLogger("qoq.server")


@dataclass(frozen=True)
class ServedModel:
    """An engine and what its clients must know of it; ``speculative`` is None: no guesses;
    ``device``: where it runs, and why.

    max_model_len bounds prompt and new tokens together; sampling are the defaults of requests that
    say nothing; template is None for models without one, tool_template the one for conversations
    with tools, often the same.
    """

    path: Path
    config: ModelConfig
    scheme: QuantScheme
    tokenizer: Tokenizer
    template: ChatTemplate | None
    tool_template: ChatTemplate | None
    tools: ToolCalling
    engine: Engine
    pool: KVPool
    max_model_len: int
    max_num_seqs: int
    sampling: dict[str, float]
    speculative: SpeculativeConfig | None = None
    device: str = "cpu"
    backend: str = "auto"

    @property
    def max_concurrency(self) -> float:
        """How many requests of ``max_model_len`` tokens the KV cache holds at a time."""
        return self.pool.num_tokens / self.max_model_len


@dataclass(frozen=True)
class EngineOptions:
    """How the engine is laid out; None: from the model or from the memory that is free.

    kv_memory_bytes wins over kv_memory_fraction, the share of free memory. generation_config:
    ``auto`` reads the model's sampling defaults, ``vllm`` none, else a folder to read them from.
    tool_call_parser and enable_auto_tool_choice are those of ``ToolCalling.of_model``. seed: that
    of requests which name none. device: as ``choose_device`` takes it; enforce_eager: no CUDA
    graphs.
    """

    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    enable_prefix_caching: bool = True
    kv_memory_bytes: int | None = None
    kv_memory_fraction: float = MEMORY_FRACTION
    generation_config: str = "auto"
    seed: int | None = None
    chat_template: str | None = None
    speculative: SpeculativeConfig | None = None
    tool_call_parser: str = "auto"
    enable_auto_tool_choice: bool | None = None
    device: str = "auto"
    enforce_eager: bool = False
    backend: str = "auto"


def load_served_model(model: str | Path, options: EngineOptions) -> ServedModel:
    """Load a folder or hub id and lay out its KV cache.

    Raises what ``load_model`` and ``Tokenizer.load`` raise, ResourceError where the cache cannot
    hold one request, RequestError for options out of range.
    """
    _check(options)
    seed = {} if options.seed is None else {"seed": options.seed}
    choice = choose_device(options.device, options.backend)
    loaded = load_model(model, backend=options.backend, device=choice.device)
    tokenizer = Tokenizer.load(loaded.path)
    tools = ToolCalling.of_model(
        tokenizer,
        loaded.config.model_type,
        template=options.chat_template,
        parser=options.tool_call_parser,
        auto=options.enable_auto_tool_choice,
    )
    context = loaded.config.max_positions
    length = options.max_model_len or context
    if length > context:
        raise RequestError(f"--max-model-len {length} is above this model's context of {context}.")
    pool = _pool(loaded.config, loaded.scheme, length, options, choice.device)
    engine = Engine(
        loaded.decoder,
        pool,
        tokenizer=tokenizer,
        eos_ids=tokenizer.eos_ids or loaded.config.eos_token_ids,
        max_requests=options.max_num_seqs,
        max_step_tokens=options.max_num_batched_tokens,
        guess=guesser(options.speculative),
        max_model_len=length,
        enable_prefix_caching=options.enable_prefix_caching,
        enforce_eager=options.enforce_eager,
        backend=options.backend,
    )
    engine.record(_told)
    return ServedModel(
        path=loaded.path,
        config=loaded.config,
        scheme=loaded.scheme,
        tokenizer=tokenizer,
        template=_template(tokenizer, options.chat_template),
        tool_template=_template(tokenizer, options.chat_template, tools=True),
        tools=tools,
        engine=engine,
        pool=pool,
        max_model_len=length,
        max_num_seqs=options.max_num_seqs,
        sampling={**sampling_defaults(loaded.path, options.generation_config), **seed},
        speculative=options.speculative,
        device=str(choice),
        backend=options.backend,
    )


def _check(options: EngineOptions) -> None:
    positive = {
        "max_model_len": options.max_model_len,
        "max_num_seqs": options.max_num_seqs,
        "max_num_batched_tokens": options.max_num_batched_tokens,
        "kv_cache_memory_bytes": options.kv_memory_bytes,
    }
    for name, value in positive.items():
        if value is not None and value < 1:
            raise RequestError(f"{name} must be 1 or more, not {value}.")
    if options.seed is not None and not -(2**63) <= options.seed < 2**63:
        raise RequestError(f"seed must be from -2**63 to 2**63 - 1, not {options.seed}.")
    if not 0 < options.kv_memory_fraction <= 1:
        raise RequestError(
            f"kv_cache_memory_fraction must be above 0 and at most 1, not "
            f"{options.kv_memory_fraction}."
        )
    check_parser(options.tool_call_parser)


def _told(done: int, total: int) -> None:
    """Log how far the recording of decode steps is: now and then."""
    if done == total or done % 10 == 0:
        _LOG.info("CUDA graphs of decode steps: %d of %d", done, total)


def _pool(
    config: ModelConfig,
    scheme: QuantScheme,
    length: int,
    options: EngineOptions,
    device: torch.device,
) -> KVPool:
    """As many pages as were asked for; else as many as can be used and fit free memory."""
    shape = PoolShape(scheme.kv, config.num_layers, config.num_kv_heads, PAGE_SIZE, config.head_dim)
    if options.kv_memory_bytes is not None:
        pages = options.kv_memory_bytes // shape.page_bytes
    else:
        free = int(memory_at_hand(device) * options.kv_memory_fraction)
        useful = options.max_num_seqs * pages_for_tokens(length, PAGE_SIZE)
        pages = min(useful, free // shape.page_bytes)
    least = pages_for_tokens(length, PAGE_SIZE)
    if pages < least:
        raise ResourceError(
            f"The KV cache holds {pages * PAGE_SIZE} tokens, one request may need {length}. Lower "
            f"--max-model-len or give --kv-cache-memory-bytes {least * shape.page_bytes} or more."
        )
    return shape.pool(pages, device)


def _template(
    tokenizer: Tokenizer, source: str | None, *, tools: bool = False
) -> ChatTemplate | None:
    """``source`` or the model's own; None where there is neither."""
    try:
        return tokenizer.chat_template(source, tools=tools)
    except RequestError:
        return None
