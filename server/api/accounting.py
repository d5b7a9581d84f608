"""Around requests that cost or change something: limits on how many, and a line in the audit log."""

from __future__ import annotations

import asyncio
import logging

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import error_response
from server.audit import AuditEntry, AuditLog
from server.metering import Meter, headers
from store.access import Caller
from store.errors import SwitchyardError

log = logging.getLogger(__name__)


class LimitMiddleware:
    """Lets requests in that a caller's limits leave room for, and tells what is left."""

    def __init__(self, app: ASGIApp, meter: Meter) -> None:
        self._app = app
        self._meter = meter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope.get("state", {})
        rule = state.get("rule")
        if rule is None or not rule.is_metered:
            await self._app(scope, receive, send)
            return
        try:
            levels = headers(await self._meter.admit(state["caller"]))
        except SwitchyardError as refusal:
            await error_response(refusal, scope)(scope, receive, send)
            return

        async def respond(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(levels)
            await send(message)

        await self._app(scope, receive, respond if levels else send)


class AuditMiddleware:
    """Writes down who changed what, before the answer says that it is done. Strangers without a key are not written
    down: whoever can reach the server could fill the disk."""

    def __init__(self, app: ASGIApp, audit: AuditLog) -> None:
        self._app = app
        self._audit = audit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})["trail"] = {}
        written = False

        async def respond(message: Message) -> None:
            nonlocal written
            if message["type"] == "http.response.start" and not written:
                written = True
                await self._write(scope, message["status"])
            await send(message)

        try:
            await self._app(scope, receive, respond)
        except BaseException:
            if not written:
                await self._write(scope, 500)
            raise

    async def _write(self, scope: Scope, status: int) -> None:
        state = scope["state"]
        rule, caller = state.get("rule"), state.get("caller")
        if rule is None or rule.action is None or caller is None:
            return
        entry = _entry(scope, rule.action, caller, status)
        try:
            await asyncio.to_thread(self._audit.write, entry)
        except OSError as error:  # what is done is done: a client that is told otherwise would do it again
            log.error("the audit log cannot be written (%s): %s", error.strerror, entry)


def _entry(scope: Scope, action: str, caller: Caller, status: int) -> AuditEntry:
    state, trail = scope["state"], dict(scope["state"]["trail"])
    named = trail.pop("target", None) or "/".join(scope.get("path_params", {}).values())
    return AuditEntry(
        action,
        named[:200] or None,
        caller.key,
        caller.tenant,
        "done" if status < 400 else "refused" if status < 500 else "failed",
        state.get("error_code") if status >= 400 else None,
        state.get("request_id"),
        trail,
    )
