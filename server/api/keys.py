"""`/v1/admin/keys`: API keys, made, listed and revoked by administrators."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated, ClassVar, Literal

from fastapi import APIRouter
from pydantic import Field
from typing_extensions import TypedDict

from server.api.conditions import GIVEN, Rules, has, lacks, when
from server.api.services import AnyServices, Asker, Trail
from server.api.wire import Text, Wire
from server.api.words import Name
from store.access import Role
from store.keys import LATEST_EXPIRY, ApiKey

router = APIRouter(prefix="/v1/admin/keys")

_MOST = 10**9

Limit = Annotated[int | None, Field(ge=1, le=_MOST)]


class KeyBody(Wire):
    """The body of `POST /v1/admin/keys`."""

    tenant: Name | None = Field(None, description="Whom it belongs to; for `admin` and `monitor` none is needed.")
    roles: list[Annotated[Role, Field(strict=False)]] = Field(
        [Role.INFER],
        fail_fast=True,
        min_length=1,
        description="infer (ask), upload (change the tenant's experts), monitor (read figures), admin.",
    )
    label: Text = Field("", max_length=200, description="For people: where it is used.")
    expires: int | None = Field(None, ge=0, le=LATEST_EXPIRY, description="Seconds since 1970; null: never.")
    requests_per_minute: Limit = None
    tokens_per_minute: Limit = None

    # Without `roles` it is a key to ask with.
    between: ClassVar[Rules] = (
        when(lacks(roles={"contains": {"enum": [Role.INFER, Role.UPLOAD]}}), has(tenant=GIVEN)),
    )


class Key(TypedDict):
    """A key, without its secret."""

    id: str
    object: Literal["api_key"]
    tenant: str | None
    roles: list[str]
    label: str
    created: int
    created_by: str
    expires: int | None
    revoked: int | None
    requests_per_minute: int | None
    tokens_per_minute: int | None


class NewKey(Key):
    """A key, and what to send as `Authorization: Bearer`: told once, and kept nowhere."""

    key: str


class KeyList(TypedDict):
    """All keys, the oldest first, with those that were revoked or have expired."""

    object: Literal["list"]
    data: list[Key]


@router.get("")
async def list_keys(services: AnyServices) -> KeyList:
    """All API keys, without their secrets."""
    return {"object": "list", "data": [_answer(key) for key in await asyncio.to_thread(services.keys.list)]}


@router.post("", status_code=201)
async def create_key(body: KeyBody, services: AnyServices, asker: Asker, trail: Trail) -> NewKey:
    """Make an API key. It works at once, on all servers of the store; this answer alone tells it."""
    given = body.model_dump() | {"roles": frozenset(body.roles)}
    key, token = await asyncio.to_thread(partial(services.keys.create, **given, by=asker.key))
    trail |= {"target": key.id, "for": key.tenant or "", "roles": " ".join(sorted(key.roles)), "label": key.label}
    return {**_answer(key), "key": token}


@router.delete("/{id}")
async def revoke_key(id: str, services: AnyServices) -> Key:
    """Revoke an API key. It opens nothing from now on; answers in progress finish."""
    return _answer(await asyncio.to_thread(services.keys.revoke, id))


def _answer(key: ApiKey) -> Key:
    return {
        "id": key.id,
        "object": "api_key",
        "tenant": key.tenant,
        "roles": sorted(key.roles),
        "label": key.label,
        "created": key.created,
        "created_by": key.created_by,
        "expires": key.expires,
        "revoked": key.revoked,
        "requests_per_minute": key.requests_per_minute,
        "tokens_per_minute": key.tokens_per_minute,
    }
