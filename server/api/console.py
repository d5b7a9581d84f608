"""`GET /` and `/console/...`: the console's page and its files, for everybody; what the page shows asks for a key."""

from __future__ import annotations

from functools import cache

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

from server.console.files import PAGE, static_files

router = APIRouter(include_in_schema=False)

_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # No text becomes markup or code, not even by a mistake in a script of our own.
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    # Names carry no version: a browser asks each time whether it still has the right bytes (304).
    "Cache-Control": "no-cache",
}

_files = cache(static_files)


@router.api_route("/", methods=["GET", "HEAD"])
async def console_page(request: Request) -> Response:
    """The page."""
    return _answer(PAGE, request)


@router.api_route("/console/{name}", methods=["GET", "HEAD"])
async def console_file(name: str, request: Request) -> Response:
    """A style sheet, a script or a picture of the page."""
    return _answer(name, request)


def _answer(name: str, request: Request) -> Response:
    file = _files().get(name)
    if file is None:
        raise HTTPException(404)
    headers = HEADERS | {"ETag": file.etag}
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if known & {file.etag, "*"}:
        return Response(status_code=304, headers=headers)
    return Response(file.body, media_type=file.media_type, headers=headers)
