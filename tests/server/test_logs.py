"""Logs: one JSON object a line, with the request's id, and nothing of what was asked or answered."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from server.logs import REQUEST_ID, JsonFormatter, set_up
from tests.api.house import BASE, CRON, make_expert, open_house

pytestmark = pytest.mark.anyio


@pytest.fixture
def kept() -> Iterator[None]:
    """Leave the process's logging as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    logging.getLogger("server.requests").setLevel(logging.NOTSET)


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter())
        self.lines: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        assert "\n" not in text
        self.lines.append(json.loads(text))


def test_a_record_is_an_object() -> None:
    handler = Lines()
    record = logging.makeLogRecord({"name": "n", "levelname": "WARNING", "msg": "%d ü\n", "args": (3,), "port": 8000})
    handler.handle(record)
    REQUEST_ID.set("req_1")
    try:
        raise ValueError("x")
    except ValueError:
        handler.handle(logging.makeLogRecord({"msg": "m", "exc_info": __import__("sys").exc_info(), "odd": {1}}))
    finally:
        REQUEST_ID.set(None)
    first, second = handler.lines
    assert (first["level"], first["logger"], first["message"], first["port"]) == ("warning", "n", "3 ü\n", 8000)
    assert first["time"].endswith("Z")
    assert "request_id" not in first
    assert second["request_id"] == "req_1"
    assert second["exception"].endswith("ValueError: x\n")


@pytest.mark.usefixtures("kept")
def test_both_forms(capsys: pytest.CaptureFixture[str]) -> None:
    out = Console(file=io.StringIO(), width=100)
    set_up("json", out)
    logging.getLogger("server.requests").info("one", extra={"status": 200})
    logging.getLogger("httpx").info("chatter")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["message"], line["status"]) for line in lines] == [("one", 200)]
    set_up("text", out)
    logging.getLogger("server.requests").info("quiet")
    logging.getLogger("server").warning("loud")
    assert isinstance(out.file, io.StringIO)
    assert "loud" in out.file.getvalue()
    assert "quiet" not in out.file.getvalue()


@pytest.mark.usefixtures("kept")
async def test_requests_are_logged_without_prompts_answers_and_keys(tmp_path: Path) -> None:
    handler = Lines()
    logging.basicConfig(level=logging.DEBUG, handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("server.requests").setLevel(logging.INFO)
    async with open_house(tmp_path, api_keys="root-key") as house:
        house.http.headers["authorization"] = "Bearer root-key"
        path = make_expert(tmp_path / "e", name="cron", exemplars=tuple(CRON))
        assert (await house.upload(path)).status_code == 201
        house.engine.reply = lambda request: b"my-secret-answer"
        for stream in (False, True):
            answer = await house.chat("my-secret-prompt", model="auto", stream=stream)
            assert answer.status_code == 200
        await house.chat("my-secret-prompt", temperature="my-secret-value")
        house.engine.failure = RuntimeError("boom")
        failed = await house.chat("my-secret-prompt")
        house.engine.failure = None
        await house.http.get("/v1/models/my-name", headers={"x-request-id": "mine"})
    text = json.dumps(handler.lines)
    assert "my-secret" not in text
    assert "root-key" not in text
    requests = [line for line in handler.lines if line["logger"] == "server.requests"]
    chats = [line for line in requests if line.get("route") == "/v1/chat/completions"]
    assert [line["status"] for line in chats] == [200, 200, 400, 500]
    assert chats[2]["error_code"] == "invalid_value"
    assert {line["key"] for line in chats} == {chats[0]["key"]}
    assert chats[0]["seconds"] >= 0
    told = [line for line in handler.lines if line.get("request_id") == failed.headers["x-request-id"]]
    assert {line["logger"] for line in told} == {"server.requests", "server.api.errors"}
    missing = next(line for line in requests if line.get("request_id") == "mine")
    assert (missing["route"], missing["status"]) == ("/v1/models/{model:path}", 404)
    assert BASE not in missing["message"]
