"""Server-sent events, and an eye on the client: one that has gone away stops costing anything."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.errors import describe
from server.closing import Closing

T = TypeVar("T")

Events = AsyncGenerator[Mapping[str, Any], None]


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do the work, unless the client goes away first. The request's body must have been read.

    Raises:
        ClientDisconnect: the client went away, and the work was cancelled.
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """An answer as `text/event-stream`. What ends it early, a failure or the server's own end, is its last event.

    Starlette's StreamingResponse leaves its iterator suspended when the client goes away, until the garbage
    collector finds it; the engine would generate for nobody.

    Args:
        close: called in the end, whatever happens.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: Events,
        closing: Closing,
        headers: Mapping[str, str] | None = None,
        close: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__(headers={**(headers or {}), "Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._closing = closing
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._send_all(scope, send))
        except (ClientDisconnect, OSError):  # servers differ in how they tell
            describe(ClientDisconnect(), scope)
        finally:
            await self._events.aclose()
            if self._close is not None:
                await self._close()

    async def _send_all(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async with self._closing.bound():
                async for event in self._events:
                    await send(_event(event))
                await send(_body(b"data: [DONE]\n\n"))
        except OSError:
            raise
        except Exception as error:
            # The status is out; OpenAI's clients raise on an event with an `error`.
            await send(_event(describe(error, scope)[1]))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


_LINE_ENDS = ("\x85", "\u2028", "\u2029")
"""What ends a line for some clients (`str.splitlines`, and so httpx), though not for the specification of events."""


def _event(content: Mapping[str, Any]) -> dict[str, Any]:
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for end in _LINE_ENDS:
        text = text.replace(end, f"\\u{ord(end):04x}")
    return _body(f"data: {text}\n\n".encode())


def _body(data: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": True}
