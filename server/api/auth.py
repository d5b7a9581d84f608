"""Who may ask: every route but a short list needs a key; without keys, only programs on this machine."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.errors import ForbiddenError, error_response
from server.settings import Settings, is_loopback
from store.errors import AuthenticationError, SwitchyardError

PUBLIC_PATHS = frozenset({"/health", "/ready"})
"""What load balancers and orchestrators ask, who have no key."""


class AuthMiddleware:
    """Refuses by default, before anything of the body is read."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._keys = KeyRing(key.get_secret_value() for key in settings.api_keys)
        self._loopback_only = settings.on_loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in PUBLIC_PATHS and (refusal := self._refuse(scope)):
            await error_response(refusal, scope)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refuse(self, scope: Scope) -> SwitchyardError | None:
        headers = Headers(scope=scope)
        if not self._keys:
            return self._refuse_foreign(headers)
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            return AuthenticationError("this server needs an API key: send `Authorization: Bearer KEY`")
        if key.strip() not in self._keys:
            return AuthenticationError("this API key is not valid")
        return None

    def _refuse_foreign(self, headers: Headers) -> SwitchyardError | None:
        """Keep web pages out of a server that runs open.

        A page can make its visitor's browser post to 127.0.0.1, directly or under a name that its owner lets
        resolve to 127.0.0.1 (DNS rebinding); the browser then tells on it in `Origin` and in `Host`.
        """
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._loopback_only and not is_loopback(urlsplit(f"//{host}").hostname or ""):
            return ForbiddenError(
                f"an open server answers on this machine's own names only, not {host!r}; set API keys"
            )
        if origin is not None and urlsplit(origin).netloc != host:
            return ForbiddenError(f"an open server does not answer pages of {origin!r}; set API keys")
        return None


class KeyRing:
    """Keys, kept as digests and compared in constant time."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def __contains__(self, key: str) -> bool:
        digest, found = _digest(key), False
        for known in self._digests:  # all of them: stopping at a match would tell how many come before it
            found |= hmac.compare_digest(digest, known)
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
