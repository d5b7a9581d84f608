"""`/v1/uploads`: files that may be interrupted on their way, by the tus protocol (https://tus.io, 1.0, core)."""

from __future__ import annotations

import base64
import re
from email.utils import formatdate
from typing import Annotated, Literal

from fastapi import APIRouter, Header, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field
from starlette.exceptions import HTTPException
from typing_extensions import TypedDict

from server.api.bodies import read_json
from server.api.forms import pour
from server.api.services import AnyServices, Asker, Services
from server.api.wire import Wire
from server.api.words import FileName
from store.errors import InvalidRequestError
from store.upload import Upload

router = APIRouter(prefix="/v1/uploads")

_VERSION = "1.0.0"
_PIECE = "application/offset+octet-stream"
_EXTENSIONS = "creation,expiration,termination"
_DIGITS = len(str(2**53))


_BASE64 = "([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?"
_PAIR = rf"[!-+\--~]+( {_BASE64})?"
_METADATA = re.compile(f"({_PAIR}(, ?{_PAIR})*)?")
_SPEAKS = {
    "name": "Tus-Resumable",
    "in": "header",
    "schema": {"const": _VERSION},
    "description": "The protocol's version.",
}
_DECLARES = [
    _SPEAKS,
    {
        "name": "Upload-Length",
        "in": "header",
        "schema": {"type": "integer", "minimum": 1, "maximum": 2**53},
        "description": "The file's size, in place of a body.",
    },
    {
        "name": "Upload-Metadata",
        "in": "header",
        "schema": {"type": "string", "pattern": f"^{_METADATA.pattern}$"},
        "description": "With `Upload-Length`: `filename` and `sha256`, each with its value in base64.",
    },
]
_TELLS = {
    name: {"schema": schema, "required": True}
    for name, schema in {
        "Tus-Resumable": {"const": _VERSION},
        "Upload-Offset": {"type": "integer", "minimum": 0},
        "Upload-Length": {"type": "integer", "minimum": 1},
        "Upload-Expires": {"type": "string"},
    }.items()
}
_BEGINS = _TELLS | {"Location": {"schema": {"type": "string"}, "required": True}}


class UploadBody(Wire):
    """The body of `POST /v1/uploads`: a file to come."""

    filename: FileName = Field(description="The file's own name, without folders.")
    bytes: int = Field(ge=1, le=2**53, description="Its size.")
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = Field(
        None, description="What its bytes must be; an open upload of the same file is then gone on with."
    )


class UploadAnswer(TypedDict):
    """An upload; `offset` says how much of it is there."""

    id: str
    object: Literal["upload"]
    filename: str
    bytes: int
    offset: int
    sha256: str | None
    status: Literal["pending", "complete"]
    created_at: int
    expires_at: int


class UploadList(TypedDict):
    """All open uploads, the oldest first."""

    object: Literal["list"]
    data: list[UploadAnswer]


@router.post(
    "",
    status_code=201,
    responses={
        200: {"model": UploadAnswer, "description": "It was begun before.", "headers": _BEGINS},
        201: {"model": UploadAnswer, "headers": _BEGINS},
    },
    openapi_extra={
        "parameters": _DECLARES,
        "requestBody": {"content": {"application/json": {"schema": UploadBody.model_json_schema()}}},
    },
)
async def create_upload(request: Request, services: AnyServices, asker: Asker) -> JSONResponse:
    """Declare a file that will be sent in pieces, by a JSON body or by the headers of the tus protocol."""
    _check_version(request)
    if "upload-length" in request.headers:
        given = _from_headers(request)
    elif "upload-metadata" in request.headers:
        raise InvalidRequestError("Upload-Metadata needs Upload-Length", param="Upload-Metadata")
    else:
        given = await read_json(request, UploadBody)
    upload, created = await services.inbox.create(given.filename, given.bytes, given.sha256, asker)
    headers = _headers(upload, services) | {"Location": f"{router.prefix}/{upload.id}"}
    return JSONResponse(_answer(upload, services), 201 if created else 200, headers)


@router.get("")
async def list_uploads(services: AnyServices, asker: Asker) -> UploadList:
    """Open uploads."""
    return {"object": "list", "data": [_answer(upload, services) for upload in await services.inbox.list(asker)]}


@router.options("", status_code=204)
async def upload_options(services: AnyServices) -> Response:
    """What of the tus protocol is spoken here."""
    limits = {"Tus-Max-Size": str(services.inbox.max_bytes), "Tus-Extension": _EXTENSIONS}
    return Response(status_code=204, headers={"Tus-Resumable": _VERSION, "Tus-Version": _VERSION, **limits})


@router.get("/{upload_id}")
async def get_upload(upload_id: str, services: AnyServices, asker: Asker) -> UploadAnswer:
    """One upload, and how much of it is there."""
    return _answer(await services.inbox.get(upload_id, asker), services)


@router.head(
    "/{upload_id}",
    response_class=Response,
    responses={200: {"headers": _TELLS}},
    openapi_extra={"parameters": [_SPEAKS]},
)
async def get_upload_offset(upload_id: str, request: Request, services: AnyServices, asker: Asker) -> Response:
    """How much of an upload is there, in the header `Upload-Offset`."""
    _check_version(request)
    upload = await services.inbox.get(upload_id, asker)
    return Response(headers=_headers(upload, services) | {"Cache-Control": "no-store"})


@router.patch(
    "/{upload_id}",
    status_code=204,
    responses={204: {"headers": _TELLS}},
    openapi_extra={
        "parameters": [_SPEAKS],
        "requestBody": {"required": True, "content": {_PIECE: {"schema": {"type": "string", "format": "binary"}}}},
    },
)
async def append_to_upload(
    upload_id: str,
    request: Request,
    services: AnyServices,
    asker: Asker,
    upload_offset: Annotated[int, Header(ge=0, le=2**53)],
) -> Response:
    """Send the next piece of an upload, which begins at `Upload-Offset`; what has arrived stays, come what may."""
    _check_version(request)
    if request.headers.get("content-type") != _PIECE:
        raise HTTPException(415, f"send the piece as {_PIECE}")
    upload = await services.inbox.receive(upload_id, upload_offset, request.stream(), pour, asker)
    return Response(status_code=204, headers=_headers(upload, services))


@router.delete("/{upload_id}", status_code=204, openapi_extra={"parameters": [_SPEAKS]})
async def delete_upload(upload_id: str, request: Request, services: AnyServices, asker: Asker) -> Response:
    """Forget an upload and its bytes."""
    _check_version(request)
    await services.inbox.delete(upload_id, asker)
    return Response(status_code=204, headers={"Tus-Resumable": _VERSION})


def _check_version(request: Request) -> None:
    if request.headers.get("tus-resumable", _VERSION) != _VERSION:
        raise HTTPException(412, f"this server speaks tus {_VERSION}", headers={"Tus-Version": _VERSION})


def _from_headers(request: Request) -> UploadBody:
    """`Upload-Length` and `Upload-Metadata`: pairs of a key and a base64 value, separated by commas."""
    length = request.headers["upload-length"].lstrip("0")
    if request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers:
        raise InvalidRequestError("a body beside Upload-Length: give one of them", param="Upload-Length")
    # Long ones are no numbers: Python does not even read them.
    if not length.isdecimal() or len(length) > _DIGITS or int(length) > 2**53:
        raise InvalidRequestError("Upload-Length must be a number of bytes, at least 1", param="Upload-Length")
    said = request.headers.get("upload-metadata", "")
    if not _METADATA.fullmatch(said):
        raise InvalidRequestError("Upload-Metadata must be keys and base64, by commas", param="Upload-Metadata")
    pairs = (pair.strip().partition(" ") for pair in said.split(","))
    try:
        metadata = {key: base64.b64decode(value).decode() for key, _, value in pairs}
    except UnicodeDecodeError:
        raise InvalidRequestError("Upload-Metadata must be base64 of UTF-8", param="Upload-Metadata") from None
    sha256 = metadata.get("sha256")
    return UploadBody.model_construct(
        filename=metadata.get("filename") or "upload", bytes=int(length), sha256=sha256 or None
    )


def _headers(upload: Upload, services: Services) -> dict[str, str]:
    return {
        "Tus-Resumable": _VERSION,
        "Upload-Offset": str(upload.offset),
        "Upload-Length": str(upload.bytes),
        "Upload-Expires": formatdate(services.inbox.expires(upload), usegmt=True),
    }


def _answer(upload: Upload, services: Services) -> UploadAnswer:
    return {
        "id": upload.id,
        "object": "upload",
        "filename": upload.filename,
        "bytes": upload.bytes,
        "offset": upload.offset,
        "sha256": upload.digest or upload.sha256,
        "status": "complete" if upload.offset == upload.bytes else "pending",
        "created_at": upload.created,
        "expires_at": services.inbox.expires(upload),
    }
