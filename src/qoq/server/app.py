"""create_app: the server's parts put together."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from qoq import __version__
from qoq.api.logprobs import LogprobWriter
from qoq.server import chat, completions, models, page, responses, tokenize
from qoq.server.async_engine import AsyncEngine
from qoq.server.context import Context
from qoq.server.errors import add_handlers
from qoq.server.metrics import ServerMetrics
from qoq.server.middleware import ApiKeys, BodyLimits, RequestIds
from qoq.server.model import ServedModel
from qoq.server.prompts import Prompts
from qoq.server.settings import ServerSettings
from qoq.server.structures import Structures
from qoq.server.wire import JSONAnswer


def create_app(model: ServedModel, settings: ServerSettings) -> FastAPI:
    """An app that serves ``model``; ``app.state.context`` is what its routes share.

    The engine's thread runs from the app's startup to its shutdown (its lifespan), which drains for
    ``settings.shutdown_timeout`` seconds.
    """
    context = _context(model, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        context.prompts.start()
        context.engine.start()
        try:
            yield
        finally:
            await context.engine.drain(settings.shutdown_timeout)
            await context.engine.close()
            context.prompts.close()
            context.structures.close()

    app = FastAPI(
        title="qoq",
        version=__version__,
        description="OpenAI-compatible server of a W4A8KV4 model.",
        root_path=settings.root_path,
        lifespan=lifespan,
        default_response_class=JSONAnswer,
    )
    app.state.context = context
    add_handlers(app)
    for module in (completions, chat, responses, tokenize, models):
        app.include_router(module.routes(context))
    app.include_router(page.routes())
    _add_middleware(app, settings)
    return app


def _add_middleware(app: FastAPI, settings: ServerSettings) -> None:
    """Innermost first: a request meets ids, then CORS, then the key, then the limits."""
    app.add_middleware(
        BodyLimits, max_bytes=settings.max_request_bytes, seconds=settings.body_timeout
    )
    if settings.api_keys:
        app.add_middleware(ApiKeys, keys=settings.api_keys, root_path=settings.root_path)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=settings.allowed_methods,
            allow_headers=settings.allowed_headers,
            allow_credentials=settings.allow_credentials,
        )
    app.add_middleware(RequestIds)


def _context(model: ServedModel, settings: ServerSettings) -> Context:
    engine = AsyncEngine(
        model.engine,
        lambda stats: ServerMetrics(
            settings.name,
            kv_tokens=model.pool.num_tokens,
            page_size=model.pool.page_size,
            max_concurrency=model.max_concurrency,
            stats=stats,
        ),
        max_open=model.max_num_seqs + settings.max_queued,
        time_limit=settings.request_timeout,
        step_limit=settings.step_timeout,
    )
    prompts = Prompts(
        model.tokenizer,
        model.template,
        model.tool_template,
        max_model_len=model.max_model_len,
        vocab_size=model.config.vocab_size,
        template_timeout=settings.template_timeout,
        trust_templates=settings.trust_request_chat_template,
    )
    structures = Structures(model.engine)
    return Context(model, settings, engine, prompts, structures, LogprobWriter(model.tokenizer))
