"""`/v1/usage`, and what administrators see and set: usage of all, limits of tenants, the audit log."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import Field
from typing_extensions import TypedDict

from server.api.services import AnyServices, Asker, Services, Trail
from server.api.wire import Wire
from server.api.words import Name
from server.metering import USAGE_FIELDS, Use
from store.access import OPERATOR
from store.errors import NotFoundError
from store.ownership import kept_bytes
from store.record import ExpertRecord
from store.tenants import Limits

router = APIRouter(prefix="/v1")

Month = Annotated[str | None, Query(pattern="^[0-9]{4}-(0[1-9]|1[0-2])$", description="Such as 2026-11; default: now.")]
Limit = Annotated[int | None, Field(ge=0, le=2**53)]


class LimitsBody(Wire):
    """The body of `PUT /v1/admin/tenants/{tenant}`; null is no limit."""

    requests_per_minute: Limit = None
    tokens_per_minute: Limit = None
    max_experts: Limit = None
    max_bytes: Limit = Field(None, description="Of all expert files, earlier versions included.")


class Spent(TypedDict):
    """What was spent."""

    requests: int
    prompt_tokens: int
    completion_tokens: int


class TenantLimits(TypedDict):
    """What a tenant may; null is no limit."""

    requests_per_minute: int | None
    tokens_per_minute: int | None
    max_experts: int | None
    max_bytes: int | None


class TenantUsage(Spent):
    """What one tenant spent in a month, and what it keeps; `tenant` is null for the operator."""

    object: Literal["usage"]
    tenant: str | None
    month: str
    keys: dict[str, Spent]
    days: dict[str, Spent]
    experts: int
    expert_bytes: int
    limits: TenantLimits


class UsageList(TypedDict):
    """What all tenants spent in a month."""

    object: Literal["list"]
    data: list[TenantUsage]


class Tenant(TenantLimits):
    """A tenant's limits; `is_usual` if it has none of its own."""

    id: str
    object: Literal["tenant"]
    is_usual: bool


class TenantList(TypedDict):
    """Every tenant that has a key, an expert or limits of its own."""

    object: Literal["list"]
    data: list[Tenant]


class AuditList(TypedDict):
    """Changes, the latest first."""

    object: Literal["list"]
    data: list[dict[str, Any]]


@router.get("/usage")
async def get_usage(services: AnyServices, asker: Asker, month: Month = None) -> TenantUsage:
    """What the caller's tenant spent in a month, by key and by day, and what it keeps."""
    used, experts = await _read(services, month := month or _now())
    return _usage(services, asker.tenant, month, used, experts)


@router.get("/admin/usage")
async def list_usage(services: AnyServices, month: Month = None) -> UsageList:
    """What every tenant spent in a month."""
    used, experts = await _read(services, month := month or _now())
    tenants = {use.tenant for use in used} | {record.access.owner for record in experts} | {*services.tenants.list()}
    ordered = sorted(tenants, key=lambda tenant: tenant or "")
    return {"object": "list", "data": [_usage(services, tenant, month, used, experts) for tenant in ordered]}


@router.get("/admin/tenants")
async def list_tenants(services: AnyServices) -> TenantList:
    """Tenants and their limits."""
    experts = await services.library.list(OPERATOR)
    known = {key.tenant for key in services.keys.list()} | {record.access.owner for record in experts}
    names = sorted({name for name in known if name is not None} | {*services.tenants.list()})
    return {"object": "list", "data": [_tenant(services, name) for name in names]}


@router.put("/admin/tenants/{tenant}")
async def set_limits(tenant: Name, body: LimitsBody, services: AnyServices, trail: Trail) -> Tenant:
    """Give a tenant limits of its own, all of them; they count at once, on all servers of the store."""
    given = body.model_dump()
    trail.update({name: str(value) for name, value in given.items()})
    await asyncio.to_thread(services.tenants.put, tenant, Limits(**given))
    return _tenant(services, tenant)


@router.delete("/admin/tenants/{tenant}")
async def reset_limits(tenant: Name, services: AnyServices) -> Tenant:
    """Let a tenant have the usual limits again. Its keys and experts stay."""
    if not await asyncio.to_thread(services.tenants.reset, tenant):
        raise NotFoundError(f"{tenant[:64]!r} has no limits of its own", param="tenant", code="tenant_not_found")
    return _tenant(services, tenant)


@router.get("/admin/audit")
async def list_audit(
    services: AnyServices,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    action: Annotated[str | None, Query(max_length=64)] = None,
    key: Annotated[str | None, Query(max_length=64)] = None,
    tenant: Annotated[str | None, Query(max_length=64)] = None,
    target: Annotated[str | None, Query(max_length=200)] = None,
) -> AuditList:
    """The latest changes on this server, and who made them; each filter asks for exactly its value."""
    given = {"action": action, "key": key, "tenant": tenant, "target": target}
    wanted = {name: value for name, value in given.items() if value is not None}
    return {"object": "list", "data": await asyncio.to_thread(services.audit.latest, limit, wanted)}


async def _read(services: Services, month: str) -> tuple[list[Use], list[ExpertRecord]]:
    await services.meter.settle()
    return await asyncio.to_thread(lambda: [*services.meter.usage(month)]), await services.library.list(OPERATOR)


def _usage(
    services: Services, tenant: str | None, month: str, used: Iterable[Use], experts: Iterable[ExpertRecord]
) -> TenantUsage:
    own = [use for use in used if use.tenant == tenant]
    kept = [record for record in experts if record.access.owner == tenant]
    return {
        "object": "usage",
        "tenant": tenant,
        "month": month,
        **_sum(own),
        "keys": {key: _sum(use for use in own if use.key == key) for key in sorted({use.key for use in own})},
        "days": {day: _sum(use for use in own if use.day == day) for day in sorted({use.day for use in own})},
        "experts": len(kept),
        "expert_bytes": kept_bytes(kept),
        "limits": _limits(services.tenants.limits(tenant)),
    }


def _sum(used: Iterable[Use]) -> Spent:
    sums = dict.fromkeys(USAGE_FIELDS, 0)
    for use in used:
        sums[use.field] = sums.get(use.field, 0) + use.amount
    return {
        "requests": sums["requests"],
        "prompt_tokens": sums["prompt_tokens"],
        "completion_tokens": sums["completion_tokens"],
    }


def _limits(limits: Limits) -> TenantLimits:
    return {
        "requests_per_minute": limits.requests_per_minute,
        "tokens_per_minute": limits.tokens_per_minute,
        "max_experts": limits.max_experts,
        "max_bytes": limits.max_bytes,
    }


def _tenant(services: Services, name: str) -> Tenant:
    own = services.tenants.list()
    return {"id": name, "object": "tenant", **_limits(services.tenants.limits(name)), "is_usual": name not in own}


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m")
