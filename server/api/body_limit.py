"""Bodies of requests: how large each may be, how long it may take, and how much memory all of them may take at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import BodyMemoryError, error_response

FREE_BYTES = 16 << 10
"""Of every body, which are not counted: small requests get through whatever large ones take. How many requests there
are at a time bounds them."""

_SLOWEST = 1024
"""Bytes a second: a body that comes more slowly is given up, however regularly its bytes drip."""

_NO_ROOM = "the bodies of other requests take all the memory there is for them; try again soon"


@dataclass(frozen=True)
class BodyRule:
    """What a request's body may be.

    Attributes:
        limit: most bytes of it.
        held: most bytes of it in memory: fewer where it goes to disk as it comes.
    """

    limit: int
    held: int


class BodyMemory:
    """The memory that bodies take, each from its first byte to the end of its request.

    Args:
        limit: most bytes of all of them together, the first `FREE_BYTES` of each left out.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0

    def has_room(self, nbytes: int) -> bool:
        """Whether there is room for a body of so many bytes."""
        return self.used + _counted(nbytes) <= self.limit

    def grow(self, before: int, now: int) -> bool:
        """Let a body of `before` bytes have `now`; False, and no change, if there is no room."""
        more = _counted(now) - _counted(before)
        if more and self.used + more > self.limit:
            return False
        self.used += more
        return True

    def free(self, nbytes: int) -> None:
        """Give back what a body of so many bytes took."""
        self.used -= _counted(nbytes)


def _counted(nbytes: int) -> int:
    return max(0, nbytes - FREE_BYTES)


class BodyLimitMiddleware:
    """Refuses bodies that are too large, at once where the length is announced, else as soon as it is exceeded; those
    that stop coming; and those that there is no memory for beside the others.

    Args:
        rule_of: what a request's body may be.
        patience: seconds that may be spent waiting for a body, besides those that `_SLOWEST` grants to its size.
    """

    def __init__(self, app: ASGIApp, rule_of: Callable[[Scope], BodyRule], patience: float, memory: BodyMemory) -> None:
        self._app = app
        self._rule_of = rule_of
        self._patience = patience
        self._memory = memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        rule, received, held, waited, is_complete = self._rule_of(scope), 0, 0, 0.0, False
        # FastAPI turns other exceptions that come out of `receive` into 400.
        too_large = HTTPException(413, f"the body exceeds the limit of {rule.limit} bytes")
        header = Headers(scope=scope).get("content-length", "")
        announced = int(header[:20]) if header.isdecimal() else 0
        refusal = too_large if announced > rule.limit else self._refusal(min(announced, rule.held))
        if refusal is not None:
            await error_response(refusal, scope)(scope, receive, send)
            return

        async def count() -> Message:
            nonlocal received, held, waited, is_complete
            if is_complete:  # what comes now is that the client goes away
                return await receive()
            began = time.monotonic()
            try:
                async with asyncio.timeout(self._patience + received / _SLOWEST - waited):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "the body took too long", {"Connection": "close"}) from None
            waited += time.monotonic() - began
            received += len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if received > rule.limit:
                raise too_large
            if not self._memory.grow(held, min(received, rule.held)):
                raise HTTPException(503, _NO_ROOM, {"Connection": "close"})
            held = min(received, rule.held)
            return message

        try:
            await self._app(scope, count, send)
        finally:
            self._memory.free(held)

    def _refusal(self, nbytes: int) -> BodyMemoryError | None:
        return None if self._memory.has_room(nbytes) else BodyMemoryError(_NO_ROOM)
