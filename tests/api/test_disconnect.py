"""A client that goes away stops costing anything."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.api.house import BASE, CRON, House
from tests.api.test_ops import scrape

pytestmark = pytest.mark.anyio


async def leave(house: House, path: str, body: bytes, *, after: int = 0, raising: bool = False, **headers: str) -> None:
    """Send a request and go away after `after` pieces of the answer; `raising` servers tell by an error in `send`."""
    pieces, gone, sent = 0, asyncio.Event(), False

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        await (asyncio.Event() if raising else gone).wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        nonlocal pieces
        if gone.is_set() and raising:
            raise OSError("connection reset")
        pieces += message["type"] == "http.response.body"
        if pieces >= after > 0:
            gone.set()

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4" if raising else "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [
            (b"host", b"localhost"),
            (b"content-type", headers.get("content_type", "application/json").encode()),
        ],
        "server": ("localhost", 80),
        "client": ("127.0.0.1", 1),
    }
    call = asyncio.create_task(house.app(scope, receive, send))  # type: ignore[arg-type]
    if after == 0:
        await asyncio.sleep(0.01)
        gone.set()
    await asyncio.wait_for(call, 2)


def body(**fields: Any) -> bytes:
    return json.dumps({"model": BASE, "messages": [{"role": "user", "content": "hello"}], **fields}).encode()


@pytest.mark.parametrize("raising", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_while_streaming(house: House, n: int, raising: bool) -> None:
    house.engine.reply = lambda _: b"x" * 1000
    house.engine.delay = 0.001
    await leave(house, "/v1/chat/completions", body(stream=True, n=n), after=3, raising=raising)
    assert len(house.engine.streams) == n
    assert house.engine.open == 0
    assert house.engine.generated < 100


@pytest.mark.parametrize("stream", [False, True])
async def test_while_waiting(house: House, stream: bool) -> None:
    house.engine.delay = 10
    await leave(house, "/v1/chat/completions", body(stream=stream, n=2))
    assert len(house.engine.streams) == 2
    assert house.engine.open == 0
    assert house.engine.generated == 0


async def test_while_texts_are_embedded(house: House) -> None:
    house.engine.featurize.clear()
    await leave(house, "/v1/embeddings", json.dumps({"model": BASE, "input": ["a", "b"]}).encode())
    assert house.engine.embedding == 0


async def test_it_is_counted(house: House) -> None:
    house.engine.delay = 10
    before = await scrape(house)
    await leave(house, "/v1/chat/completions", body())
    after = await scrape(house)
    for name in ("requests_total|/v1/chat/completions|499", "failures_total|client_disconnected"):
        assert after[f"switchyard_{name}"] == before.get(f"switchyard_{name}", 0) + 1


async def test_an_answer_that_is_complete_is_not_a_disconnect(house: House) -> None:
    response = await house.chat(CRON[0], model="auto", stream=True)
    assert response.status_code == 200
    assert all(stream.closed for stream in house.engine.streams)
