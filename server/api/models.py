"""`/v1/models`: everything that may stand in a request's `model`."""

from __future__ import annotations

from typing import Literal, NotRequired

from fastapi import APIRouter
from typing_extensions import TypedDict

from server.api.services import AnyServices, Services
from server.generation import AUTO
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


class ModelList(TypedDict):
    """All models."""

    object: Literal["list"]
    data: list[Model]


@router.get("")
async def list_models(services: AnyServices) -> ModelList:
    """The base, `auto`, and every expert."""
    experts = [_expert(record, services) for record in await services.library.list()]
    return {"object": "list", "data": [*_own(services), *experts]}


@router.get("/{model:path}")
async def get_model(model: str, services: AnyServices) -> Model:
    """One model. The base's name may hold slashes."""
    for own in _own(services):
        if own["id"] == model:
            return own
    return _expert(await services.library.get(model), services)


def _own(services: Services) -> list[Model]:
    base = services.engine.base.name
    return [_model(base, services.started, base, None), _model(AUTO, services.started, AUTO, base)]


def _expert(record: ExpertRecord, services: Services) -> Model:
    model = _model(record.name, record.created, record.digest, services.engine.base.name)
    return {**model, "digest": record.digest, "bytes": record.bytes}


def _model(name: str, created: int, root: str, parent: str | None) -> Model:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "switchyard",
        "root": root,
        "parent": parent,
    }
