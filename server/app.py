"""Puts the rooms together: engine, registry and router, behind the HTTP routes."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.types import Scope

from router.router import Router
from server import __version__
from server.api import (
    aliases,
    chat,
    completions,
    console,
    debug,
    embeddings,
    errors,
    exemplars,
    experts,
    jobs,
    keys,
    lora,
    models,
    ops,
    route,
    route_map,
    route_report,
    sharing,
    tokens,
    uploads,
    usage,
)
from server.api.accounting import AuditMiddleware, LimitMiddleware
from server.api.auth import AuthMiddleware
from server.api.bodies import MAX_BYTES
from server.api.body_limit import BodyLimitMiddleware, BodyMemory, BodyRule
from server.api.description import describe_api
from server.api.middleware import ClosingMiddleware, CrowdMiddleware, RequestMiddleware
from server.api.services import Services
from server.audit import AuditLog
from server.chores import Chore
from server.closing import Closing
from server.encoding import Encoder
from server.engine.types import Engine
from server.generation import Generation
from server.harvest import Harvest
from server.inbox import Inbox
from server.jobs.book import JobBook
from server.jobs.jobs import JobLimits, Jobs
from server.library import Library
from server.lifetime import lifespan
from server.local_files import LocalFiles
from server.metering import Meter
from server.metrics import Metrics
from server.mirrors import mirroring
from server.recency import Recency
from server.route_reports import RouteReports
from server.settings import Settings
from server.shadow import Shadow
from server.tracing import tracing_to
from server.work_metrics import WorkCollector
from store.backends.ledger import Ledger
from store.expert_header import ExpertHeader
from store.keys import Keys
from store.registry import Registry
from store.tenants import Tenants
from store.uploads import Uploads

log = logging.getLogger(__name__)

_FOLLOW_SECONDS = 0.2
"""How often the registry is asked whether anything has changed; asking costs microseconds."""
_USAGE_SECONDS = 5.0
"""What a server that is killed has not saved of its tenants' usage."""

_HELD_OF_UPLOADS = MAX_BYTES
"""What of an upload is in memory at most: pieces on their way to disk, or the JSON that comes instead of a file."""

_SHADOW_SECONDS = 0.5
_HARVEST_SECONDS = 60.0

_ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": errors.ErrorAnswer, "description": "Any failure."} for status in ("4XX", "5XX")
}


def create_app(
    settings: Settings,
    *,
    engine: Engine,
    registry: Registry,
    ledger: Ledger,
    router: Router,
    quarantine: Path,
    check: Callable[[Path], ExpertHeader],
    base_folder: Path,
) -> FastAPI:
    """The HTTP application over a loaded engine.

    Its lifespan starts the engine, then teaches the router the experts of the registry; `/ready` tells when that is
    done. It stops the engine at the end.

    Args:
        ledger: where API keys, tenants' limits and usage are.
        quarantine: the store's folder for bytes that are not trusted yet.
        check: checks an uploaded expert file, where it can do no harm; see `Library`.
        base_folder: the base's checkpoint, for jobs.
    """
    tracing = tracing_to(settings.otel_endpoint)
    api_keys, tenants = Keys(ledger), Tenants(ledger, settings.tenant_limits())
    meter = Meter(ledger, api_keys, tenants)
    metrics = Metrics(engine.stats, registry.list, registry.tiers)
    limits = {"max_n": settings.max_n, "max_sequences": settings.max_sequences}
    library = Library(
        registry,
        router,
        engine,
        quarantine,
        check,
        max_upload_bytes=settings.max_upload_bytes,
        patience=settings.routing_wait,
        quota_of=tenants.quota,
    )
    book = JobBook(settings.data_dir / "jobs", settings.max_jobs)
    kept = _uploads_of(settings, book)
    metrics.registry.register(WorkCollector(kept.list, book.list))
    audit = AuditLog(settings.data_dir / "audit.jsonl")
    recency, encoder = Recency(), Encoder(engine)
    generation = Generation(
        engine,
        registry,
        router,
        metrics,
        **limits,
        encoder=encoder,
        charge=meter.charge,
        tracing=tracing,
        used=recency.note,
    )
    services = Services(
        engine=engine,
        router=router,
        library=library,
        inbox=Inbox(kept, quarantine),
        jobs=Jobs(book, library, base_folder, settings.cache_dir, partial(_job_limits, settings, engine)),
        encoder=encoder,
        generation=generation,
        reports=_reporting(registry, router, generation),
        recency=recency,
        metrics=metrics,
        chores=[
            Chore("following the registry", _FOLLOW_SECONDS, library.look),
            *_upkeep(settings, registry),
            Chore("saving usage", _USAGE_SECONDS, meter.settle),
            *mirroring(settings, library),
            *_watching(settings, generation, router, metrics),
            *_harvesting(settings, generation, library, engine, audit),
        ],
        tool_format=settings.tool_format(engine.tokenizer.chat_template),
        local_files=LocalFiles(sorted(settings.lora_dirs)),
        keys=api_keys,
        tenants=tenants,
        meter=meter,
        tracing=tracing,
        audit=audit,
        closing=Closing(),
        started=int(time.time()),
    )
    # The documentation pages of FastAPI load their scripts from elsewhere; /openapi.json stays.
    app = FastAPI(
        title="Switchyard",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        responses=_ERROR_RESPONSES,
    )
    app.state.services = services
    errors.install(app)
    for resource in (
        chat,
        completions,
        embeddings,
        tokens,
        models,
        experts,
        exemplars,
        sharing,
        aliases,
        uploads,
        jobs,
        keys,
        usage,
        debug,
        lora,
        route,
        route_map,
        route_report,
        ops,
    ):
        app.include_router(resource.router)
    if settings.console:
        app.include_router(console.router)

    describe_api(app, settings)

    bodies = BodyMemory(settings.body_bytes)
    metrics.body_bytes.set_function(lambda: bodies.used)
    metrics.body_limit_bytes.set(bodies.limit)

    def body_rule(scope: Scope) -> BodyRule:
        prefix = experts.router.prefix
        below = scope["path"].removeprefix(f"{prefix}/")
        replacement = scope["method"] == "PUT" and below != scope["path"] and "/" not in below
        upload = replacement or (scope["method"] == "POST" and scope["path"] == prefix)
        if scope["method"] == "PATCH" and scope["path"].startswith(f"{uploads.router.prefix}/"):
            return BodyRule(settings.upload_bytes, _HELD_OF_UPLOADS)
        if upload:
            return BodyRule(settings.max_upload_bytes, _HELD_OF_UPLOADS)
        return BodyRule(settings.max_body_bytes, settings.max_body_bytes)

    # The last one added is the first one a request meets.
    app.add_middleware(BodyLimitMiddleware, rule_of=body_rule, patience=settings.client_seconds, memory=bodies)
    app.add_middleware(LimitMiddleware, meter=meter)
    app.add_middleware(AuthMiddleware, settings=settings, keys=services.keys)
    app.add_middleware(AuditMiddleware, audit=services.audit)
    app.add_middleware(CrowdMiddleware, most=settings.max_requests)
    app.add_middleware(ClosingMiddleware, closing=services.closing)
    app.add_middleware(RequestMiddleware, metrics=metrics, tracing=tracing)
    return app


def _reporting(registry: Registry, router: Router, generation: Generation) -> RouteReports:
    reports = RouteReports(registry, router)
    generation.watch_routed(reports.note)
    return reports


def _harvesting(
    settings: Settings, generation: Generation, library: Library, engine: Engine, audit: AuditLog
) -> list[Chore]:
    most = settings.harvest_exemplars
    if not most:
        return []
    harvest = Harvest(library, engine.tokenizer, audit, most=most, tokens=settings.feature_tokens)
    generation.watch(harvest.note)
    return [Chore("harvesting exemplars", _HARVEST_SECONDS, harvest.work)]


def _watching(settings: Settings, generation: Generation, router: Router, metrics: Metrics) -> list[Chore]:
    """What is done with requests that name their expert, where that is asked for."""
    if not settings.router_shadow:
        return []
    shadow = Shadow(settings.router_shadow, generation.decide, router.knows, metrics.routing)
    generation.watch(shadow.consider)
    return [Chore("routing in the shadow", _SHADOW_SECONDS, shadow.work)]


def _job_limits(settings: Settings, engine: Engine) -> JobLimits:
    parameters = sum(math.prod(shape) for shape in engine.base.manifest.tensors.values())
    return JobLimits(
        memory=settings.job_memory or (4 << 30) + 16 * parameters,
        file_bytes=settings.upload_bytes,
        seconds=int(3600 * settings.job_hours),
    )


def _uploads_of(settings: Settings, book: JobBook) -> Uploads:
    return Uploads(
        settings.data_dir / "uploads",
        max_bytes=settings.upload_bytes,
        max_open=settings.max_uploads,
        seconds=3600 * settings.upload_hours,
        beside=book.input_bytes,
    )


def _upkeep(settings: Settings, registry: Registry) -> list[Chore]:
    async def collect() -> None:
        due = [idle for idle in await asyncio.to_thread(registry.collect_garbage, settings.gc_grace) if idle.is_due]
        if due:
            log.info("%d files that no expert needs are gone: %d bytes", len(due), sum(idle.bytes for idle in due))

    return [Chore("the garbage collection", min(60.0, max(1.0, settings.gc_grace / 4)), collect)]
