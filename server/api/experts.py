"""`/v1/experts`: upload, replace, list, look at, roll back and delete experts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse
from pydantic import Field
from typing_extensions import TypedDict

from server.api.forms import PartKind, PartRule, read_form
from server.api.services import AnyServices, ReadyServices, Services
from server.api.wire import Wire
from store.errors import InvalidRequestError
from store.exemplars import MAX_BYTES, parse_exemplars
from store.expert_header import ExpertHeader, SparseEntry
from store.intake import Received
from store.record import ExpertRecord

router = APIRouter(prefix="/v1/experts")

_PARTS = {
    "file": {"type": "string", "format": "binary", "description": "The expert file."},
    "exemplars": {"type": "string", "description": "JSON lines of prompts, as a file or as text."},
    "name": {"type": "string", "description": "What to call it; default: the name in the file."},
}
_REPLACEMENT = {"type": "object", "required": ["file"], "additionalProperties": False,
                "properties": {key: part for key, part in _PARTS.items() if key != "name"}}  # fmt: skip
_FORM = {"type": "object", "required": ["file"], "additionalProperties": False, "properties": _PARTS}


class Expert(TypedDict):
    """An expert."""

    id: str
    object: Literal["expert"]
    created: int
    parent: str
    digest: str
    bytes: int
    base_fingerprint: str
    codec: str
    density: float
    bits_per_param: float
    description: str
    exemplar_count: int


class Tensors(TypedDict):
    """What an expert file holds, in numbers."""

    ternary: int
    dense: int
    elements: int
    nonzeros: int


class ExpertDetails(Expert):
    """An expert, and what its file says about how it was made."""

    codec_params: dict[str, Any]
    tool: str
    tensors: Tensors


class ExpertList(TypedDict):
    """Experts by name. With `has_more`, the last one's `id` is the `after` of the next page."""

    object: Literal["list"]
    data: list[Expert]
    has_more: bool


class Version(TypedDict):
    """What a name points to, or has pointed to."""

    digest: str
    object: Literal["expert.version"]
    created: int
    bytes: int
    codec: str
    bits_per_param: float
    description: str
    exemplar_count: int
    current: bool


class VersionList(TypedDict):
    """The versions of one expert: the present one, then the earlier ones, the latest first."""

    object: Literal["list"]
    data: list[Version]


class Rollback(Wire):
    """Which version a name shall point to again."""

    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """None: the latest earlier one."""


class Deleted(TypedDict):
    """What is left of an expert."""

    id: str
    object: Literal["expert"]
    deleted: Literal[True]


@router.post(
    "",
    status_code=201,
    responses={200: {"model": Expert, "description": "It was there already."}, 201: {"model": Expert}},
    openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}},
)
async def upload_expert(request: Request, services: ReadyServices) -> JSONResponse:
    """Publish an expert file. It is live when the answer comes; the same file again changes nothing."""
    async with _read_upload(request, services) as upload:
        record, created = await services.library.publish(upload.file, name=upload.name, exemplars=upload.exemplars)
    return JSONResponse(_expert(record, services), 201 if created else 200)


@router.get("")
async def list_experts(
    services: AnyServices,
    q: Annotated[str, Query(max_length=200)] = "",
    limit: Annotated[int, Query(ge=1, le=1000)] = 1000,
    after: Annotated[str, Query(max_length=64)] = "",
) -> ExpertList:
    """Experts by name, page by page; `q` looks for letters in name and description."""
    records, more = await services.library.page(after=after, limit=limit, matching=q)
    return {"object": "list", "data": [_expert(record, services) for record in records], "has_more": more}


@router.get("/{name}")
async def get_expert(name: str, services: AnyServices) -> ExpertDetails:
    """One expert, and how its file was made."""
    record = await services.library.get(name)
    header = await services.library.header(record)
    return {
        **_expert(record, services),
        "codec_params": dict(header.codec_params),
        "tool": header.tool,
        "tensors": _tensors(header),
    }


@router.put(
    "/{name}",
    responses={200: {"model": Expert}, 201: {"model": Expert, "description": "There was none of that name."}},
    openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _REPLACEMENT}}}},
)
async def replace_expert(name: str, request: Request, services: ReadyServices) -> JSONResponse:
    """Publish an expert file under a name, whatever that points to. Answers in progress finish on the old file."""
    async with _read_upload(request, services) as upload:
        if upload.name is not None:
            raise InvalidRequestError("the name is in the path", param="name", code="unknown_parameter")
        record, changed = await services.library.publish(
            upload.file, name=name, exemplars=upload.exemplars, replace=True
        )
    return JSONResponse(_expert(record, services), 201 if changed and not record.earlier else 200)


@router.get("/{name}/versions")
async def list_versions(name: str, services: AnyServices) -> VersionList:
    """What a name points to, and what it can go back to."""
    record = await services.library.get(name)
    return {"object": "list", "data": [_version(one, i == 0) for i, one in enumerate(record.versions)]}


@router.post("/{name}/rollback")
async def roll_back_expert(name: str, body: Rollback, services: ReadyServices) -> Expert:
    """Let a name point to an earlier version again. Answers in progress finish."""
    return _expert(await services.library.roll_back(name, body.digest), services)


@router.delete("/{name}")
async def delete_expert(name: str, services: ReadyServices) -> Deleted:
    """Unpublish an expert. Answers in progress finish."""
    record = await services.library.remove(name)
    return {"id": record.name, "object": "expert", "deleted": True}


@dataclass(frozen=True)
class _Upload:
    file: Received
    name: str | None
    exemplars: list[str] | None


@asynccontextmanager
async def _read_upload(request: Request, services: Services) -> AsyncIterator[_Upload]:
    """The parts of an upload; the file is gone afterwards, unless it was published."""
    rules = {
        "file": PartRule(PartKind.FILE, services.library.max_upload_bytes),
        "exemplars": PartRule(PartKind.SMALL, MAX_BYTES),
        "name": PartRule(PartKind.TEXT, 1024),
    }
    async with read_form(request, rules, services.library.quarantine) as form:
        if "file" not in form.files:
            raise InvalidRequestError(
                "send the expert file as the part `file` of a multipart/form-data body, with a filename",
                param="file",
                code="missing_required_parameter",
            )
        given = form.values.get("exemplars")
        exemplars = None if given is None else await asyncio.to_thread(parse_exemplars, given)
        yield _Upload(form.files["file"], form.text("name"), exemplars)


def _expert(record: ExpertRecord, services: Services) -> Expert:
    return {
        "id": record.name,
        "object": "expert",
        "created": record.created,
        "parent": services.engine.base.name,
        "digest": record.digest,
        "bytes": record.bytes,
        "base_fingerprint": record.base_fingerprint,
        "codec": record.codec,
        "density": record.density,
        "bits_per_param": record.bits_per_param,
        "description": record.description,
        "exemplar_count": record.exemplar_count,
    }


def _version(version: ExpertRecord, current: bool) -> Version:
    return {
        "digest": version.digest,
        "object": "expert.version",
        "created": version.created,
        "bytes": version.bytes,
        "codec": version.codec,
        "bits_per_param": version.bits_per_param,
        "description": version.description,
        "exemplar_count": version.exemplar_count,
        "current": current,
    }


def _tensors(header: ExpertHeader) -> Tensors:
    entries = list(header.tensors.values())
    sparse = [entry for entry in entries if isinstance(entry, SparseEntry)]
    return {
        "ternary": len(sparse),
        "dense": len(entries) - len(sparse),
        "elements": sum(entry.numel for entry in entries),
        "nonzeros": sum(entry.nnz if isinstance(entry, SparseEntry) else entry.numel for entry in entries),
    }
