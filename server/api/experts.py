"""`/v1/experts`: upload, replace, list, look at, roll back and delete experts."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse
from pydantic import BeforeValidator, Field

from server.api.expert_answers import (
    Deleted,
    Expert,
    ExpertDetails,
    ExpertList,
    VersionList,
    details_answer,
    expert_answer,
    version_answer,
)
from server.api.expert_upload import PUBLICATION, REPLACEMENT, read_upload
from server.api.services import AnyServices, Asker, ReadyServices, Trail
from server.api.wire import Text, Wire
from server.api.words import METADATA, MetadataValue, Name, Tags, not_too_many
from store.expert_info import MAX_DESCRIPTION_BYTES

router = APIRouter(prefix="/v1/experts")


class Rollback(Wire):
    """Which version a name shall point to again."""

    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """None: the latest earlier one."""


class Description(Wire):
    """What to say about an expert from now on; what is left out stays as it is."""

    description: Text | None = Field(None, json_schema_extra={"maxLength": MAX_DESCRIPTION_BYTES})
    tags: Tags | None = None
    metadata: (
        Annotated[dict[Text, MetadataValue | None], BeforeValidator(not_too_many), Field(json_schema_extra=METADATA)]
        | None
    ) = None
    """Entries to set; null takes one away."""


@router.post(
    "",
    status_code=201,
    responses={200: {"model": Expert, "description": "It was there already."}, 201: {"model": Expert}},
    openapi_extra={"requestBody": PUBLICATION},
)
async def upload_expert(request: Request, services: ReadyServices, asker: Asker, trail: Trail) -> JSONResponse:
    """Publish an expert file. It is live when the answer comes; the same file again changes nothing."""
    async with read_upload(request, services) as upload:
        trail |= {"target": upload.name or "", "digest": upload.file.digest}
        record, created = await services.library.publish(
            upload.file, name=upload.name, exemplars=upload.exemplars, by=asker, signature=upload.signature
        )
    trail["target"] = record.name
    return JSONResponse(expert_answer(record, services, asker), 201 if created else 200)


@router.get("")
async def list_experts(
    services: AnyServices,
    asker: Asker,
    tag: Annotated[list[str], Query(default_factory=list, max_length=16)],
    q: Annotated[str, Query(max_length=200)] = "",
    limit: Annotated[int, Query(ge=1, le=1000)] = 1000,
    after: Annotated[str, Query(max_length=64)] = "",
) -> ExpertList:
    """Experts by name, page by page; `tag` asks for a tag, `q` looks for letters in what is said about them."""
    records, more = await services.library.page(after=after, limit=limit, matching=q, tags=tag, by=asker)
    return {"object": "list", "data": [expert_answer(record, services, asker) for record in records], "has_more": more}


@router.get("/{name}")
async def get_expert(name: Name, services: AnyServices, asker: Asker) -> ExpertDetails:
    """One expert, and how its file was made."""
    record = await services.library.get(name, asker)
    header, layers = await services.library.header(record), await services.library.layers(record)
    return details_answer(record, header, layers, services, asker)


@router.put(
    "/{name}",
    responses={200: {"model": Expert}, 201: {"model": Expert, "description": "There was none of that name."}},
    openapi_extra={"requestBody": REPLACEMENT},
)
async def replace_expert(
    name: Name, request: Request, services: ReadyServices, asker: Asker, trail: Trail
) -> JSONResponse:
    """Publish an expert file under a name, whatever that points to. Answers in progress finish on the old file."""
    async with read_upload(request, services, named=True) as upload:
        trail["digest"] = upload.file.digest
        record, changed = await services.library.publish(
            upload.file, name=name, exemplars=upload.exemplars, by=asker, replace=True, signature=upload.signature
        )
    return JSONResponse(expert_answer(record, services, asker), 201 if changed and not record.earlier else 200)


@router.get("/{name}/versions")
async def list_versions(name: Name, services: AnyServices, asker: Asker) -> VersionList:
    """What a name points to, and what it can go back to."""
    record = await services.library.get(name, asker)
    return {"object": "list", "data": [version_answer(one, i == 0) for i, one in enumerate(record.versions)]}


@router.post("/{name}/rollback")
async def roll_back_expert(name: Name, body: Rollback, services: ReadyServices, asker: Asker) -> Expert:
    """Let a name point to an earlier version again. Answers in progress finish."""
    return expert_answer(await services.library.roll_back(name, body.digest, asker), services, asker)


@router.patch("/{name}")
async def describe_expert(name: Name, body: Description, services: ReadyServices, asker: Asker) -> Expert:
    """Change what is said about an expert: description, tags, metadata. Its file and its digest stay as they are."""
    record = await services.library.describe(
        name, description=body.description, tags=body.tags, metadata=body.metadata, by=asker
    )
    return expert_answer(record, services, asker)


@router.delete("/{name}")
async def delete_expert(name: Name, services: ReadyServices, asker: Asker, force: bool = False) -> Deleted:
    """Unpublish an expert; with `force`, also one that has aliases, and them too. Answers in progress finish."""
    record = await services.library.remove(name, asker, force=force)
    return {"id": record.name, "object": "expert", "deleted": True}
