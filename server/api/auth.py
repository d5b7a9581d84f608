"""Who may ask: every route but a short list needs a key; without keys, only programs on this machine."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from server.access_settings import is_loopback
from server.api.errors import ForbiddenError, error_response
from server.api.rules import path_of, rule_of
from server.settings import Settings
from store.access import Caller, Role
from store.errors import AuthenticationError
from store.keys import Keys

ANYONE = Caller("open", None, frozenset(Role))
"""Everybody, where a server runs open."""
NOBODY = Caller("none")
"""Who asks without a key for what needs none."""


class AuthMiddleware:
    """Refuses by default, before anything of the body is read. Notes the caller in the request's state."""

    def __init__(self, app: ASGIApp, settings: Settings, keys: Keys) -> None:
        self._app = app
        self._bootstrap = BootstrapKeys(key.get_secret_value() for key in settings.api_keys)
        self._keys = keys
        self._loopback_only = settings.on_loopback
        self._open = settings.may_run_open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                scope.setdefault("state", {})["caller"] = self._admit(scope)
            except Exception as refusal:
                await error_response(refusal, scope)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _admit(self, scope: Scope) -> Caller:
        """Who asks, if they may.

        Raises:
            AuthenticationError: there is no valid key.
            ForbiddenError: the key is not for this, or the request comes from a foreign page.
            HTTPException: there is nothing of that kind.
            StoreError: the keys cannot be read.
        """
        declared = path_of(scope["path"])
        rule = None if declared is None else rule_of(scope["method"], declared)
        if rule is not None and rule.role is None:
            return NOBODY
        caller = self._identify(Headers(scope=scope))
        scope["state"] |= {"caller": caller, "rule": rule}
        if rule is None and not caller.is_admin:
            # Not left to the routes: one that was forgotten in the table must not run for everybody.
            if declared is None:
                raise HTTPException(404)
            raise HTTPException(405)
        if rule is not None and rule.role is not None and not caller.may(rule.role):
            raise ForbiddenError(f"this needs a key with the role {rule.role}", code="insufficient_role")
        return caller

    def _identify(self, headers: Headers) -> Caller:
        if self._open and (self._bootstrap or self._keys):
            self._open = False  # for good: revoking the last key must not open the server again
        if self._open:
            self._refuse_foreign(headers)
            return ANYONE
        scheme, _, token = headers.get("authorization", "").partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not token:
            raise AuthenticationError("this server needs an API key: send `Authorization: Bearer KEY`")
        if (found := self._bootstrap.find(token)) is not None:
            return found
        key = self._keys.find(token)
        if key is None:
            raise AuthenticationError("this API key is not valid")
        return key.caller

    def _refuse_foreign(self, headers: Headers) -> None:
        """Keep web pages out of a server that runs open.

        A page can make its visitor's browser post to 127.0.0.1, directly or under a name that its owner lets
        resolve to 127.0.0.1 (DNS rebinding); the browser then tells on it in `Origin` and in `Host`.
        """
        host, origin = headers.get("host", ""), headers.get("origin")
        address = _split(f"//{host}")
        if self._loopback_only and (address is None or not is_loopback(address.hostname or "")):
            raise ForbiddenError(f"an open server answers on this machine's own names only, not {host!r}; set API keys")
        page = None if origin is None else _split(origin)
        if origin is not None and (page is None or page.netloc != host):
            raise ForbiddenError(f"an open server does not answer pages of {origin!r}; set API keys")


class BootstrapKeys:
    """Keys of the settings, to make others with. Kept as digests, compared in constant time."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = sorted(_digest(key) for key in keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def find(self, key: str) -> Caller | None:
        """Whose key it is, if it is one."""
        digest, found = _digest(key), None
        for known in self._digests:  # all of them: stopping at a match would tell how many come before it
            if hmac.compare_digest(digest, known):
                found = known
        return None if found is None else Caller(f"settings-{found[:6].hex()}", None, frozenset({Role.ADMIN}))


def _split(address: str) -> SplitResult | None:
    """The parts of an address; None of one that cannot be read."""
    try:
        return urlsplit(address)
    except ValueError:
        return None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
