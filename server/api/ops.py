"""For operators: is it alive, is it ready, how is it doing, what is it."""

from __future__ import annotations

import asyncio
from typing import Literal

from fastapi import APIRouter
from starlette.responses import Response
from typing_extensions import TypedDict

from server import __version__
from server.api.services import AnyServices, ReadyServices
from server.metrics import CONTENT_TYPE
from store.errors import EngineDeadError

router = APIRouter()


class Status(TypedDict):
    """All is well; anything else is an error."""

    status: Literal["ok"]


class Version(TypedDict):
    """What answers here."""

    version: str
    base: str
    fingerprint: str


@router.get("/health")
async def health(services: AnyServices) -> Status:
    """Whether the engine is alive; if not, the process must be restarted."""
    if not services.engine.alive:
        raise EngineDeadError("the engine is not running; restart the server")
    return {"status": "ok"}


@router.get("/ready")
async def ready(services: ReadyServices) -> Status:
    """Whether requests can be sent here now."""
    return await health(services)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(services: AnyServices) -> Response:
    """Figures for Prometheus."""
    return Response(await asyncio.to_thread(services.metrics.render), media_type=CONTENT_TYPE)


@router.get("/version")
async def version(services: AnyServices) -> Version:
    """The server's version, and the base it serves."""
    base = services.engine.base
    return {"version": __version__, "base": base.name, "fingerprint": base.manifest.fingerprint}
