"""Every failure becomes one shape, OpenAI's: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Scope
from typing_extensions import TypedDict

from server.api.rules import methods_of, path_of
from store import errors

log = logging.getLogger(__name__)

RETRY_SECONDS = 5
"""When to come again after a 503."""

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that went away; nobody reads it but our metrics."""


class ErrorDetail(TypedDict):
    """What went wrong: `param` names the field at fault, `code` is for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(TypedDict):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class NotReadyError(errors.SwitchyardError):
    """The server has not finished starting (503)."""

    code = "not_ready"


class BusyError(errors.SwitchyardError):
    """Too many requests are at work (503)."""

    code = "too_many_requests"
    retry_after = 1


class BodyMemoryError(errors.SwitchyardError):
    """The bodies of other requests take all the memory that there is for them (503)."""

    code = "body_memory_full"


class ForbiddenError(errors.SwitchyardError):
    """The request comes from where it may not come from (403)."""

    code = "forbidden"


_STATUS: dict[type[errors.SwitchyardError], int] = {
    errors.InvalidRequestError: 400,
    errors.AuthenticationError: 401,
    errors.UntrustedError: 403,
    ForbiddenError: 403,
    errors.NotPermittedError: 403,
    errors.NotFoundError: 404,
    errors.ConflictError: 409,
    errors.TooLargeError: 413,
    errors.QueueFullError: 429,
    errors.RateLimitError: 429,
    errors.ExpertUnavailableError: 503,
    errors.StoreError: 503,
    errors.StorageFullError: 507,
    errors.ClosingError: 503,
    errors.EngineDeadError: 503,
    errors.MissingPackageError: 501,
    NotReadyError: 503,
    BusyError: 503,
    BodyMemoryError: 503,
    errors.SwitchyardError: 500,
}

_HTTP_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "payload_too_large",
    503: BodyMemoryError.code,
}

_VALIDATION_FAULTS = {
    "extra_forbidden": ("unknown_parameter", "there is no such parameter"),
    "missing": ("missing_required_parameter", "this parameter is required"),
    "unsupported_parameter": ("unsupported_parameter", "this parameter is not supported yet"),
    "union_tag_not_found": ("invalid_value", "has the wrong type"),
}
"""pydantic's word for a fault → our code and message; its own message serves for all others."""

_BRANCHES = {
    "content": ("text", "parts"),
    "stop": ("text", "parts"),
    "prompt": ("text", "texts", "tokens", "token_lists"),
    "input": ("text", "texts", "tokens", "token_lists"),
    "tool_choice": ("word", "named"),
}
"""Fields that are unions → the tags of their branches, which pydantic puts behind the field's name."""


def error_body(message: str, status: int, *, param: str | None = None, code: str | None = None) -> ErrorAnswer:
    """The one error object."""
    return {"error": {"message": message, "type": _type_of(status), "param": param, "code": code}}


def describe(error: Exception, scope: Scope) -> tuple[int, ErrorAnswer]:
    """Status and body for any exception. What we did not raise on purpose is logged and told to nobody.

    Notes the error's code in the request's state, for the metrics.
    """
    if isinstance(error, errors.SwitchyardError):
        status = next(_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS)
        body = error_body(error.message, status, param=error.param, code=error.code)
    elif isinstance(error, RequestValidationError):
        status, body = 400, _validation_body(error)
    elif isinstance(error, HTTPException) and error.status_code == 400 and (why := why_no_json(error.__cause__)):
        # FastAPI, which reads the body, calls only a misplaced character invalid JSON.
        status, body = 400, error_body(f"the body is not valid JSON: {why}", 400, code="invalid_json")
    elif isinstance(error, HTTPException):
        status = error.status_code
        body = error_body(_phrase(error, scope), status, code=_HTTP_CODES.get(status, "invalid_request"))
    elif isinstance(error, ClientDisconnect):
        status = CLIENT_CLOSED_REQUEST
        body = error_body("the client closed the connection", status, code="client_disconnected")
    else:
        status, request_id = 500, scope.get("state", {}).get("request_id")
        log.error("request %s failed", request_id, exc_info=error)
        body = error_body(f"the server failed on this request, {request_id}", status, code="internal_error")
    scope.setdefault("state", {})["error_code"] = body["error"]["code"]
    return status, body


def error_response(error: Exception, scope: Scope) -> JSONResponse:
    """The answer for any exception."""
    status, body = describe(error, scope)
    headers = dict(getattr(error, "headers", None) or {})
    declared = path_of(scope["path"]) if status == HTTPStatus.METHOD_NOT_ALLOWED else None
    if declared is not None:  # the router names the methods of one route, of several with this path
        headers = {"Allow": ", ".join(methods_of(declared))}
    if status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        headers["Retry-After"] = str(getattr(error, "retry_after", RETRY_SECONDS))
    return JSONResponse(body, status, headers)


def why_no_json(error: BaseException | None) -> str | None:
    """What is wrong with JSON as a whole that could not be read; None if that is not what the error tells."""
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return "a number has too many digits" if isinstance(error, ValueError) else None


def install(app: FastAPI) -> None:
    """Answer every exception that a route or the routing itself raises on purpose."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        return error_response(error, request.scope)

    for kind in (errors.SwitchyardError, RequestValidationError, HTTPException, ClientDisconnect):
        app.add_exception_handler(kind, handle)


def _type_of(status: int) -> str:
    types = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    return types.get(status, "server_error" if status >= 500 else "invalid_request_error")


def _phrase(error: HTTPException, scope: Scope) -> str:
    if error.detail and error.detail != HTTPStatus(error.status_code).phrase:
        return str(error.detail)
    what = {404: "there is no", 405: "the method is not allowed:"}.get(error.status_code, "cannot serve")
    return f"{what} {scope['method']} {scope['path']}"


def _validation_body(error: RequestValidationError) -> ErrorAnswer:
    """The first fault says enough; a client mends one after the other."""
    fault: Mapping[str, Any] = error.errors()[0]
    kind, context = fault["type"], fault.get("ctx", {})
    if kind == "json_invalid":
        where = "".join(f" at character {step}" for step in fault["loc"][1:])
        return error_body(f"the body is not valid JSON: {context['error']}{where}", 400, code="invalid_json")
    param = context.get("param") or _param(fault["loc"], error.body)
    if param is not None and param.startswith("."):  # of an object somewhere inside
        param = f"{_param(fault['loc'], error.body) or ''}{param}".removeprefix(".")
    if param is None:
        message = "the body must be a JSON object, sent as application/json"
        return error_body(message, 400, code="invalid_value")
    # What a validator raised, without the words that pydantic puts in front of it.
    said = str(context["error"]) if kind in ("value_error", "assertion_error") else fault["msg"]
    code, what = _VALIDATION_FAULTS.get(kind, ("invalid_value", said))
    return error_body(f"{param}: {context.get('what', what)}", 400, param=param, code=code)


def _param(location: Sequence[str | int], body: Any) -> str | None:
    """`("body", "messages", 0, "content")` as `messages[0].content`; steps that name a union's branch left out."""
    if location[0] in ("query", "header"):
        return str(location[-1])
    path, union = "", None
    for step in location[1:]:
        if isinstance(step, str) and (not isinstance(body, dict) or step in _BRANCHES.get(union or "", ())):
            union = None
            continue
        union = step if isinstance(step, str) else None
        path += f"[{step}]" if isinstance(step, int) else f".{step}"
        try:
            body = body[step]
        except (LookupError, TypeError):
            body = None
    return path.removeprefix(".") or None
