"""What happens around every request: an id, a count, a last answer to failures, and limits on how many there are and on
how long they outlive a server that stops."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import BusyError, error_response
from server.api.rules import PUBLIC_PATHS, path_of
from server.closing import Closing
from server.logs import REQUEST_ID as LOGGED_ID
from server.metrics import Metrics
from server.tracing import Span, Tracing
from store.errors import ClosingError

log = logging.getLogger("server.requests")

REQUEST_ID = "x-request-id"
_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class RequestMiddleware:
    """Gives each request an id, counts it, and answers what nobody else has caught."""

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = given if _SANE_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        LOGGED_ID.set(request_id)
        began = time.monotonic()
        with self._tracing.request(scope["method"], Headers(scope=scope)) as span:
            try:
                await self._answer(scope, receive, send, request_id)
            finally:
                self._note(scope, time.monotonic() - began, span)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        """Have the request answered; the status is noted in its state."""
        state = scope["state"]

        async def respond(message: Message) -> None:
            if message["type"] == "http.response.start":
                state["status"] = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        try:
            await self._app(scope, receive, respond)
        except Exception as error:
            response = error_response(error, scope)
            if "status" in state:  # half an answer is out: only closing the connection can tell
                raise
            await response(scope, receive, respond)

    def _note(self, scope: Scope, seconds: float, span: Span) -> None:
        # The route, not the path: paths are the client's choice, and each would be a time series.
        # What was refused before it came to its route is counted there all the same.
        route = getattr(scope.get("route"), "path", None) or path_of(scope["path"]) or "unmatched"
        state = scope["state"]
        status = state.get("status", 0)
        self._metrics.requests.labels(route, str(status)).inc()
        code, caller = state.get("error_code"), state.get("caller")
        if code:
            self._metrics.failures.labels(code).inc()
        told = {
            "method": scope["method"],
            "route": route,
            "status": status,
            "seconds": round(seconds, 6),
            "error_code": code,
            "key": None if caller is None else caller.key,
            "tenant": None if caller is None else caller.tenant,
        }
        log.info("%s %s %s", scope["method"], route, status, extra={k: v for k, v in told.items() if v is not None})
        span.set(
            name=f"{scope['method']} {route}",
            http__route=route,
            http__response__status_code=status,
            request_id=state["request_id"],
        )


class ClosingMiddleware:
    """Refuses what has no answer yet when the time of a server that stops is over; streams end with an event then."""

    def __init__(self, app: ASGIApp, closing: Closing) -> None:
        self._app = app
        self._closing = closing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            async with self._closing.bound() as bound:

                async def respond(message: Message) -> None:
                    if message["type"] == "http.response.start":
                        await bound.release()
                    await send(message)

                await self._app(scope, receive, respond)
        except ClosingError as error:
            await error_response(error, scope)(scope, receive, send)


class CrowdMiddleware:
    """Refuses requests while too many others are at work. Probes and figures always get through: they tell of it."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app = app
        self._most = most
        self._now = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _ALWAYS:
            await self._app(scope, receive, send)
            return
        if self._now >= self._most:
            await error_response(BusyError(f"{self._now} requests are at work; try again soon"), scope)(
                scope, receive, send
            )
            return
        self._now += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._now -= 1


_ALWAYS = PUBLIC_PATHS | {"/metrics", "/debug/engine"}
