"""One HTTP request to an ASGI application in this process, and its answer piece by piece."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from starlette.types import ASGIApp, Message

Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True)
class Head:
    """A request without its body. `wanted` is for whoever chooses a replica for it."""

    method: str
    path: str
    query: bytes
    headers: Headers
    client: tuple[str, int] | None = None
    scheme: str = "http"
    wanted: str = ""


@dataclass(frozen=True)
class Start:
    """The beginning of an answer."""

    status: int
    headers: Headers


async def call(app: ASGIApp, head: Head, body: bytes) -> AsyncIterator[Start | bytes]:
    """Send a request and yield a `Start`, then the answer's bytes as they come.

    Closing the iterator is what a client's disconnecting is: the application is told, and waited for.

    Raises:
        Exception: what the application raised; it does so where an answer was half out.
    """
    pieces: asyncio.Queue[Message | None] = asyncio.Queue()
    gone = asyncio.Event()
    sent = False

    async def receive() -> Message:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        await pieces.put(message)

    async def run() -> None:
        try:
            await app(_scope(head), receive, send)
        finally:
            await pieces.put(None)

    task = asyncio.create_task(run())
    try:
        while (message := await pieces.get()) is not None:
            if message["type"] == "http.response.start":
                yield Start(message["status"], [(bytes(name), bytes(value)) for name, value in message["headers"]])
            elif message.get("body"):
                yield bytes(message["body"])
        await task
    finally:
        gone.set()
        if not task.done():
            await asyncio.wait([task], timeout=_PARTING_SECONDS)
            task.cancel()


_PARTING_SECONDS = 5.0
"""How long an application may take to notice that its client has gone."""


def _scope(head: Head) -> dict[str, object]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": head.method,
        "scheme": head.scheme,
        "path": head.path,
        "raw_path": head.path.encode(),
        "query_string": head.query,
        "root_path": "",
        "headers": head.headers,
        "client": head.client,
        "server": None,
        "state": {},
    }
