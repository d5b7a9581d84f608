"""What the routes work with, made once in `server.app` and handed to each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from router.router import Router
from server.api.errors import NotReadyError
from server.audit import AuditLog
from server.chores import Chore
from server.closing import Closing
from server.encoding import Encoder
from server.engine.types import Engine
from server.generation import Generation
from server.inbox import Inbox
from server.jobs.jobs import Jobs
from server.library import Library
from server.local_files import LocalFiles
from server.metering import Meter
from server.metrics import Metrics
from server.recency import Recency
from server.route_reports import RouteReports
from server.tools.use import ToolFormat
from server.tracing import Tracing
from store.access import Caller
from store.keys import Keys
from store.tenants import Tenants


@dataclass
class Services:
    """The rooms of one server."""

    engine: Engine
    router: Router
    library: Library
    inbox: Inbox
    jobs: Jobs
    encoder: Encoder
    generation: Generation
    reports: RouteReports
    recency: Recency
    metrics: Metrics
    chores: Sequence[Chore]
    tool_format: ToolFormat | None
    """How the base writes calls of tools; None if it cannot."""
    local_files: LocalFiles
    keys: Keys
    tenants: Tenants
    meter: Meter
    tracing: Tracing
    audit: AuditLog
    closing: Closing
    started: int
    """Unix seconds."""
    ready: bool = False
    """Whether the router knows every expert of the registry again."""

    @property
    def fingerprint(self) -> str:
        """Short form of the base's fingerprint: OpenAI's `system_fingerprint`."""
        return f"fp_{self.engine.base.manifest.fingerprint[:12]}"


async def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


async def _ready_services(request: Request) -> Services:
    services = await _services(request)
    if not services.ready:
        raise NotReadyError("the server is still starting; try again soon")
    return services


async def _asker(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


async def _trail(request: Request) -> dict[str, str]:
    trail: dict[str, str] = request.state.trail
    return trail


AnyServices = Annotated[Services, Depends(_services)]
"""The services, whatever state they are in."""

ReadyServices = Annotated[Services, Depends(_ready_services)]
"""The services, once they can answer anything; 503 before."""

Asker = Annotated[Caller, Depends(_asker)]
"""Who asks, as `server.api.auth` has found out."""

Trail = Annotated[dict[str, str], Depends(_trail)]
"""What the audit log is to tell of a change: `target`, where the path does not say it, and more."""
