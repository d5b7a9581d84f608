"""`/v1/models`: everything that may stand in a request's `model`."""

from __future__ import annotations

from typing import Literal, NotRequired

from fastapi import APIRouter
from typing_extensions import TypedDict

from server.api.services import AnyServices, Asker, Services
from server.generation import AUTO
from store.alias import Alias
from store.record import ExpertRecord

router = APIRouter(prefix="/v1/models")


class Model(TypedDict):
    """The base, an expert of it, or `auto`."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["switchyard"]
    root: str
    """The base or `auto` itself; of an expert, the digest of its file."""
    parent: str | None
    digest: NotRequired[str]
    bytes: NotRequired[int]
    alias_of: NotRequired[str]
    """Of an alias, the expert's own name."""


class ModelList(TypedDict):
    """All models."""

    object: Literal["list"]
    data: list[Model]


@router.get("")
async def list_models(services: AnyServices, asker: Asker) -> ModelList:
    """The base, `auto`, every expert, and every alias."""
    experts = [_expert(record, services) for record in await services.library.list(asker)]
    aliases = [_alias(alias, record, services) for alias, record in await services.library.aliases(asker)]
    return {"object": "list", "data": [*_own(services), *experts, *aliases]}


@router.get("/{model:path}")
async def get_model(model: str, services: AnyServices, asker: Asker) -> Model:
    """One model. The base's name may hold slashes."""
    for own in _own(services):
        if own["id"] == model:
            return own
    record = await services.library.get(model, asker)
    if record.name != model:
        return _alias(await services.library.alias(model, asker), record, services)
    return _expert(record, services)


def _own(services: Services) -> list[Model]:
    base = services.engine.base.name
    return [_model(base, services.started, base, None), _model(AUTO, services.started, AUTO, base)]


def _expert(record: ExpertRecord, services: Services) -> Model:
    model = _model(record.name, record.created, record.digest, services.engine.base.name)
    return {**model, "digest": record.digest, "bytes": record.bytes}


def _alias(alias: Alias, record: ExpertRecord, services: Services) -> Model:
    return {**_expert(record, services), "id": alias.name, "created": alias.created, "alias_of": alias.target}


def _model(name: str, created: int, root: str, parent: str | None) -> Model:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "switchyard",
        "root": root,
        "parent": parent,
    }
