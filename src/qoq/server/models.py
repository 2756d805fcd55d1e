"""/v1/models and what tells whether the server lives: /health, /ping, /load, ..."""

import time
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from qoq import __version__
from qoq.server.context import Context
from qoq.server.errors import engine_dead
from qoq.server.report import start_report


def routes(context: Context) -> APIRouter:
    """The routes, bound to what they serve."""
    router = APIRouter(tags=["server"])
    started = int(time.time())
    report = start_report(context.model)
    runs = {name: report[name] for name in ("scheme", "device", "isa", "threads", "ops")}

    def card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": started,
            "owned_by": "qoq",
            "root": context.settings.name,
            "parent": None,
            "max_model_len": context.model.max_model_len,
            **runs,
        }

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The names this server answers to."""
        names = context.settings.served_model_names
        return {"object": "list", "data": [card(name) for name in names]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        return card(context.check_model(name))

    @router.get("/health")
    async def health() -> Response:
        """200 while requests can be answered, 503 once the engine is dead."""
        if not context.engine.alive:
            raise engine_dead()
        return Response()

    @router.get("/ping")
    @router.post("/ping")
    async def ping() -> Response:
        """The same as /health, under the name that some load balancers ask for."""
        return await health()

    @router.get("/load")
    async def load() -> dict[str, int]:
        """Texts that run or wait."""
        return {"server_load": context.engine.num_open}

    @router.get("/version")
    async def version() -> dict[str, str]:
        """The version of qoq."""
        return {"version": __version__}

    @router.get("/metrics")
    async def metrics() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(context.engine.metrics.text(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    return router
