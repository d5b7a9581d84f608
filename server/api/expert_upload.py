"""An expert file as clients send it: in the request itself, or as a resumable upload that has arrived before."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from pydantic import Field

from server.api.bodies import read_json
from server.api.forms import PartKind, PartRule, read_form
from server.api.services import Services
from server.api.wire import Text, Wire
from server.api.words import Exemplar, Name, schema_of
from store.errors import InvalidRequestError, TooLargeError
from store.exemplars import MAX_BYTES, MAX_LINES, parse_exemplars
from store.expert_info import NAME_PATTERN
from store.intake import Received
from store.signature import MAX_BYTES as MAX_SIGNATURE_BYTES
from store.signature import decode_signature

_MAX_NAME_BYTES = 1024


class FromUpload(Wire):
    """The body of a publication whose file has arrived before."""

    upload: Text = Field(description="Id of a complete upload; it is used up.")
    name: Name | None = Field(None, description="What to call it; default: the name in the file.")
    exemplars: list[Exemplar] | None = Field(
        None, fail_fast=True, min_length=1, max_length=MAX_LINES, description="Prompts, instead of those in the file."
    )
    signature: Text | None = Field(None, description="Of the file, as `switchyard sign` writes it.")


_PARTS = {
    "file": {"type": "string", "format": "binary", "description": "The expert file."},
    "exemplars": {"type": "string", "description": "JSON lines of prompts, as a file or as text."},
    "signature": {"type": "string", "description": "Of the file, as `switchyard sign` writes it: a file or text."},
    "name": {
        "type": "string",
        **schema_of(NAME_PATTERN),
        "description": "What to call it; default: the name in the file.",
    },
}


def _documented(*left_out: str) -> dict[str, Any]:
    form = {"type": "object", "required": ["file"], "additionalProperties": False}
    body = FromUpload.model_json_schema()
    for schema, properties in ((form, _PARTS), (body, body["properties"])):
        schema["properties"] = {key: value for key, value in properties.items() if key not in left_out}
    content = {"multipart/form-data": {"schema": form}, "application/json": {"schema": body}}
    return {"required": True, "content": content}


PUBLICATION = _documented()
REPLACEMENT = _documented("name")


@dataclass(frozen=True)
class ExpertUpload:
    """An expert file in quarantine, and what was said about it."""

    file: Received
    name: str | None
    exemplars: list[str] | None
    signature: str | None


@asynccontextmanager
async def read_upload(request: Request, services: Services, *, named: bool = False) -> AsyncIterator[ExpertUpload]:
    """What a request publishes; the file is gone afterwards, unless it was published.

    Args:
        named: the name is known already, and the request may not give another.

    Raises:
        InvalidRequestError, NotFoundError, ConflictError, TooLargeError, StoreError: there is no such thing.
        ClientDisconnect: the client went away.
    """
    async with AsyncExitStack() as stack:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json":
            upload = await _from_upload(request, services, stack)
        else:
            upload = await _from_form(request, services, stack)
        if named and upload.name is not None:
            raise InvalidRequestError("the name is in the path", param="name", code="unknown_parameter")
        yield upload


async def _from_form(request: Request, services: Services, stack: AsyncExitStack) -> ExpertUpload:
    rules = {
        "file": PartRule(PartKind.FILE, services.library.max_upload_bytes),
        "exemplars": PartRule(PartKind.SMALL, MAX_BYTES),
        "signature": PartRule(PartKind.SMALL, MAX_SIGNATURE_BYTES),
        "name": PartRule(PartKind.TEXT, _MAX_NAME_BYTES),
    }
    form = await stack.enter_async_context(read_form(request, rules, services.library.quarantine))
    if "file" not in form.files:
        raise InvalidRequestError(
            "send the expert file as the part `file` of a multipart/form-data body, with a filename",
            param="file",
            code="missing_required_parameter",
        )
    given = form.values.get("exemplars")
    exemplars = None if given is None else await asyncio.to_thread(parse_exemplars, given)
    signature = form.values.get("signature")
    return ExpertUpload(
        form.files["file"], form.text("name"), exemplars, None if signature is None else decode_signature(signature)
    )


async def _from_upload(request: Request, services: Services, stack: AsyncExitStack) -> ExpertUpload:
    body = await read_json(request, FromUpload)
    file = await stack.enter_async_context(services.inbox.taken(body.upload, request.state.caller))
    if file.bytes > services.library.max_upload_bytes:
        raise TooLargeError(
            f"the file exceeds the limit of {services.library.max_upload_bytes} bytes for an expert", param="upload"
        )
    signature = None if body.signature is None else decode_signature(body.signature.encode())
    return ExpertUpload(file, body.name, body.exemplars, signature)
