"""Context: what the routes share, handed to them when the app is made."""

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from fastapi import Request, Response

from qoq.api.logprobs import LogprobWriter
from qoq.api.protocol import QueueFields
from qoq.engine.request import SamplingParams
from qoq.server.async_engine import AsyncEngine
from qoq.server.errors import CLIENT_GONE, APIError
from qoq.server.generation import Delta, Generation
from qoq.server.model import ServedModel
from qoq.server.prompts import Prompts
from qoq.server.settings import ServerSettings
from qoq.server.sse import Events, EventStream
from qoq.server.structures import Structures
from qoq.server.wire import JSONAnswer

T = TypeVar("T")
Texts = list[tuple[list[int], SamplingParams]]  # what an HTTP request asks: prompt, parameters


@dataclass(frozen=True)
class Context:
    """One model behind one server."""

    model: ServedModel
    settings: ServerSettings
    engine: AsyncEngine
    prompts: Prompts
    structures: Structures
    logprobs: LogprobWriter

    def check_model(self, name: str | None) -> str:
        """The name to answer with. Raises APIError 404 for a model we do not serve."""
        if name is None or name == "":
            return self.settings.name
        if name not in self.settings.served_model_names:
            known = ", ".join(self.settings.served_model_names)
            raise APIError(
                404,
                f"The model {name[:200]!r} does not exist here; this server has: {known}.",
                param="model",
                code="model_not_found",
            )
        return name


class Job(Protocol):
    """What a route makes of one HTTP request."""

    @property
    def texts(self) -> Texts:
        """What the engine is asked."""

    @property
    def body(self) -> QueueFields:
        """What was sent."""

    def answer(self, texts: Sequence[Delta]) -> dict[str, Any]:
        """The whole answer."""

    def events(self, generation: Generation) -> Events:
        """The answer as it grows."""


async def respond(context: Context, request: Request, job: Job, *, stream: bool | None) -> Response:
    """Run a job: its answer whole, or as a stream of events."""
    generation = await begin(context, request, job.texts, job.body)
    if stream:
        return EventStream(job.events(generation), generation, request_id(request))
    return JSONAnswer(job.answer(await answers(request, generation)))


async def begin(context: Context, request: Request, texts: Texts, body: QueueFields) -> Generation:
    """Put texts in line; returns once the engine has taken them, or raises what it says."""
    compiling = context.structures.compile(params for _, params in texts)
    compiled = await unless_gone(request, compiling)
    generation = context.engine.submit(texts, priority=body.priority, salt=body.cache_salt or "")
    try:
        await unless_gone(request, generation.accepted())
        del compiled  # the engine has found it
    except BaseException:
        generation.abort()
        raise
    return generation


async def answers(request: Request, generation: Generation) -> list[Delta]:
    """Every text whole; when the client hangs up first, the engine is told to stop."""
    try:
        return await unless_gone(request, generation.answers())
    finally:
        generation.abort()


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of ``work``, or an APIError nobody reads once the client has hung up."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise APIError(CLIENT_GONE, "The client has closed the connection.")
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def request_id(request: Request) -> str:
    """The id that the middleware gave this request."""
    return str(request.scope["state"]["request_id"])


def note(request: Request, **facts: Any) -> None:
    """Facts for this request's line in the log."""
    request.scope["state"].setdefault("facts", {}).update(facts)
