"""The time of a server that stops is over: streams say so in their last event, all else is refused and may be asked
for again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from server.jobs import jobs
from tests.api.house import BASE, CRON, House, error, open_house
from tests.api.test_jobs import begin, until

pytestmark = pytest.mark.anyio

CHAT = ("/v1/chat/completions", {"model": BASE, "messages": [{"role": "user", "content": "hello"}]})
COMPLETION = ("/v1/completions", {"model": BASE, "prompt": "hello"})


@pytest.fixture
async def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[House]:
    """A server that is closed for good; its jobs take as long as they like."""
    monkeypatch.setattr(jobs, "_MODULE", "tests.server.strange_job")
    async with open_house(tmp_path) as house:
        yield house


class Call:
    """A request at work: the server's messages as they come."""

    def __init__(self, house: House, method: str, path: str, body: dict[str, Any] | None) -> None:
        self.status = 0
        self.body = b""
        self.whole = False
        self.begun = asyncio.Event()
        self._sent = json.dumps(body).encode() if body is not None else b""
        self._asked = False
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
            "server": ("localhost", 80),
            "client": ("127.0.0.1", 1),
        }
        self.task = asyncio.create_task(house.app(scope, self._receive, self._send))  # type: ignore[arg-type]

    async def _receive(self) -> dict[str, Any]:
        if self._asked:
            await asyncio.Event().wait()
        self._asked = True
        return {"type": "http.request", "body": self._sent, "more_body": False}

    async def _send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            return
        self.body += message["body"]
        self.whole = not message.get("more_body", False)
        self.begun.set()

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(event.removeprefix(b"data: ")) for event in self.body.split(b"\n\n")[:-1]]


@pytest.mark.parametrize("asked", [CHAT, COMPLETION])
async def test_a_streams_last_event_is_the_error(own: House, asked: tuple[str, dict[str, Any]]) -> None:
    path, body = asked
    own.engine.reply, own.engine.delay = lambda _: b"x" * 4000, 0.01
    call = Call(own, "POST", path, body | {"stream": True, "n": 2})
    await asyncio.wait_for(call.begun.wait(), 60)
    own.app.state.services.closing.end()
    await asyncio.wait_for(call.task, 60)
    assert (call.status, call.whole) == (200, True)
    *chunks, last = call.events
    assert all(chunk["choices"] for chunk in chunks)
    assert last["error"]["code"] == "shutting_down"
    assert last["error"]["type"] == "server_error"
    assert own.engine.open == 0


async def test_who_watches_a_job_is_told(own: House) -> None:
    at = await begin(own, word="sleep")
    await until(own, at, "running")
    call = Call(own, "GET", f"{at}/events", None)
    await asyncio.wait_for(call.begun.wait(), 60)
    own.app.state.services.closing.end()
    await asyncio.wait_for(call.task, 60)
    first, *_, last = call.events
    assert first["object"] == "job"
    assert last["error"]["code"] == "shutting_down"
    assert call.whole


@pytest.mark.parametrize(
    ("path", "body"),
    [
        CHAT,
        COMPLETION,
        (CHAT[0], CHAT[1] | {"stream": True}),
        (COMPLETION[0], COMPLETION[1] | {"stream": True, "n": 3}),
        ("/v1/embeddings", {"model": BASE, "input": "hello"}),
    ],
)
async def test_what_has_no_answer_yet_is_refused(own: House, path: str, body: dict[str, Any]) -> None:
    own.engine.delay = 3600
    own.engine.featurize.clear()
    asking = asyncio.create_task(own.http.post(path, json=body))
    async with asyncio.timeout(60):
        while not (own.engine.open or (path == "/v1/embeddings" and own.app.state.services.closing.at_work)):
            await asyncio.sleep(0.01)
    own.app.state.services.closing.end()
    answer = await asyncio.wait_for(asking, 60)
    assert error(answer, 503)["code"] == "shutting_down"
    assert int(answer.headers["retry-after"]) > 0
    assert own.engine.open == 0


async def test_what_comes_afterwards_is_refused(own: House) -> None:
    own.app.state.services.closing.end()
    own.app.state.services.closing.end()
    assert error(await own.chat(), 503)["code"] == "shutting_down"
    assert error(await own.http.get("/v1/models"), 503)["code"] == "shutting_down"


async def test_an_upload_on_its_way_is_refused(own: House) -> None:
    async def dribble() -> AsyncIterator[bytes]:
        yield b'--b\r\ncontent-disposition: form-data; name="file"; filename="e"\r\n\r\n' + b"x" * 1000
        own.app.state.services.closing.end()
        await asyncio.Event().wait()

    form = {"content-type": "multipart/form-data; boundary=b"}
    answer = await own.http.post("/v1/experts", content=dribble(), headers=form)
    assert error(answer, 503)["code"] == "shutting_down"
    assert own.quarantined == []


async def test_answers_are_whole_while_there_is_time(house: House) -> None:
    assert (await house.chat(CRON[0])).status_code == 200
    assert not house.app.state.services.closing.at_work
