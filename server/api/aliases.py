"""`/v1/aliases`: other names for experts, which follow them through replacements."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from typing_extensions import TypedDict

from server.api.services import AnyServices, Asker, ReadyServices
from server.api.wire import Wire
from server.api.words import Name
from store.alias import Alias

router = APIRouter(prefix="/v1/aliases")


class Target(Wire):
    """What an alias shall point to."""

    target: Name
    """An expert's own name."""


class AliasAnswer(TypedDict):
    """Another name of an expert."""

    id: str
    object: Literal["alias"]
    created: int
    target: str


class AliasList(TypedDict):
    """All aliases."""

    object: Literal["list"]
    data: list[AliasAnswer]


class DeletedAlias(TypedDict):
    """What is left of an alias."""

    id: str
    object: Literal["alias"]
    deleted: Literal[True]


@router.get("")
async def list_aliases(services: AnyServices, asker: Asker) -> AliasList:
    """All aliases, by name."""
    return {"object": "list", "data": [_answer(alias) for alias, _ in await services.library.aliases(asker)]}


@router.get("/{alias}")
async def get_alias(alias: Name, services: AnyServices, asker: Asker) -> AliasAnswer:
    """One alias, and what it points to."""
    return _answer(await services.library.alias(alias, asker))


@router.put(
    "/{alias}",
    responses={200: {"model": AliasAnswer}, 201: {"model": AliasAnswer, "description": "There was none."}},
)
async def put_alias(alias: Name, body: Target, services: ReadyServices, asker: Asker) -> JSONResponse:
    """Let an alias point to an expert, whatever it pointed to before."""
    found, created = await services.library.put_alias(alias, body.target, asker)
    return JSONResponse(_answer(found), 201 if created else 200)


@router.delete("/{alias}")
async def delete_alias(alias: Name, services: ReadyServices, asker: Asker) -> DeletedAlias:
    """Take an alias away. Its expert stays."""
    found = await services.library.remove_alias(alias, asker)
    return {"id": found.name, "object": "alias", "deleted": True}


def _answer(alias: Alias) -> AliasAnswer:
    return {"id": alias.name, "object": "alias", "created": alias.created, "target": alias.target}
