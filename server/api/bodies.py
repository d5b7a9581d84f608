"""JSON bodies of routes that take other kinds of bodies too: read by hand, bounded, as strict as all others."""

from __future__ import annotations

from json import JSONDecodeError, loads
from typing import Any, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from server.api.errors import why_no_json
from server.api.wire import Wire
from store.errors import TooLargeError

Body = TypeVar("Body", bound=Wire)

MAX_BYTES = 2 << 20


async def read_json(request: Request, kind: type[Body]) -> Body:
    """The body as a value of that kind.

    Raises:
        RequestValidationError: it is none.
        TooLargeError: it has more than `MAX_BYTES` bytes.
        ClientDisconnect: the client went away.
    """
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > MAX_BYTES:
            raise TooLargeError(f"a JSON body here has at most {MAX_BYTES} bytes")
    value = _parsed(bytes(data))
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        faults = [{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors()]
        raise RequestValidationError(faults, body=value) from None


def _parsed(data: bytes) -> Any:
    try:
        return loads(data)
    except JSONDecodeError as error:
        fault = {"type": "json_invalid", "loc": ("body", error.pos), "msg": "", "ctx": {"error": error.msg}}
    except (ValueError, RecursionError) as error:
        fault = {"type": "json_invalid", "loc": ("body",), "msg": "", "ctx": {"error": why_no_json(error)}}
    raise RequestValidationError([fault])
