"""`switchyard push` of large files: pieces, lost connections, and a second attempt."""

from __future__ import annotations

import io
import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from server import pushing
from server.client import Client, ServerError, UnreachableError
from server.pushing import push_file, upload_file
from server.raw_pushing import _follow
from tests.api.house import CRON, make_expert
from tests.server.live import live_server

DATA = random.Random(1).randbytes(3 << 20)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with live_server(tmp_path_factory.mktemp("server")) as url:
        yield url


class Shaky(Client):
    """A client whose connection breaks after so many bytes, time and again."""

    def __init__(self, server: str, *, breaks_after: int, times: int = 1000) -> None:
        super().__init__(server)
        self.breaks_after, self.times, self.sent = breaks_after, times, 0

    def append(self, upload_id: str, offset: int, length: int, pieces: Iterator[bytes]) -> None:
        def cut() -> Iterator[bytes]:
            for piece in pieces:
                if self.sent >= self.breaks_after and self.times:
                    self.sent, self.times = 0, self.times - 1
                    raise UnreachableError("the cable was pulled")
                self.sent += len(piece)
                yield piece

        super().append(upload_id, offset, length, cut())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "große datei.safetensors"
    path.write_bytes(DATA)
    return path


def quiet() -> Console:
    return Console(file=io.StringIO())


def hardly(_: float) -> None:
    time.sleep(0.05)


def test_goes_on_where_the_connection_broke(server: str, file: Path) -> None:
    client = Shaky(server, breaks_after=1 << 20)
    upload = upload_file(client, quiet(), file, wait=hardly)
    assert client.upload_offset(upload) == len(DATA)
    assert client.times < 1000
    client._send("DELETE", f"/v1/uploads/{upload}")


def test_a_second_attempt_goes_on(server: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    with pytest.raises(UnreachableError):
        upload_file(Shaky(server, breaks_after=0), quiet(), file, wait=waited.append)
    assert len(waited) == 8
    assert waited == sorted(waited)
    with pytest.raises(KeyboardInterrupt):
        interrupt(monkeypatch, server, file)
    client = Client(server)
    begun = client._send("GET", "/v1/uploads").json()["data"]
    assert [0 < upload["offset"] < len(DATA) for upload in begun] == [True]
    assert upload_file(client, quiet(), file) == begun[0]["id"]
    client._send("DELETE", f"/v1/uploads/{begun[0]['id']}")


def interrupt(monkeypatch: pytest.MonkeyPatch, server: str, file: Path) -> None:
    """Push, and press Ctrl-C in the middle."""

    def pieces(data: io.BufferedReader, tell: Callable[[int], None]) -> Iterator[bytes]:
        sent = 0
        while piece := data.read(1 << 18):
            yield piece
            sent += len(piece)
            if calls and sent > 1 << 20:
                raise KeyboardInterrupt
        calls.append(1)

    calls: list[int] = []
    with monkeypatch.context() as patched:
        patched.setattr(pushing, "_pieces", pieces)
        upload_file(Client(server), quiet(), file)


@contextmanager
def telling(monkeypatch: pytest.MonkeyPatch, *looks: list[str | None]) -> Iterator[Client]:
    """A client of a server whose event streams of a job have these lines; None is a silence that takes too long."""

    def stream(*_: object) -> AbstractContextManager[httpx.Response]:
        def lines() -> Iterator[bytes]:
            for line in coming.pop(0):
                if line is None:
                    raise httpx.ReadTimeout("timed out")
                yield f"{line}\n\n".encode()

        return nullcontext(httpx.Response(200, content=lines()))

    coming = list(looks)
    client = Client("http://nowhere")
    monkeypatch.setattr(client._http, "stream", stream)
    yield client
    assert coming == []


def job_event(status: str) -> str:
    return "data: " + json.dumps({"id": "job_1", "status": status, "progress": None, "error": None})


def test_a_job_is_looked_at_again_after_a_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    first = [job_event("queued"), ": nothing new", None]
    with telling(monkeypatch, first, [job_event("queued"), None], [job_event("succeeded"), "data: [DONE]"]) as client:
        assert _follow(client, quiet(), {"id": "job_1"})["status"] == "succeeded"
    with (
        telling(monkeypatch, first, [None]) as client,
        pytest.raises(UnreachableError, match="no answer"),
    ):
        _follow(client, quiet(), {"id": "job_1"})


def test_what_ends_a_stream_early_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    ending = 'data: {"error": {"message": "the server is shutting down", "param": null, "code": "shutting_down"}}'
    with (
        telling(monkeypatch, [job_event("queued"), ending]) as client,
        pytest.raises(ServerError, match="shutting down") as caught,
    ):
        _follow(client, quiet(), {"id": "job_1"})
    assert caught.value.code == "shutting_down"


def test_a_large_expert_is_published(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pushing, "RESUMABLE_BYTES", 1)
    expert, client = make_expert(tmp_path / "e", name="cron"), Client(server)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(f'"{text}"' for text in CRON))
    record, created = push_file(client, quiet(), expert, name=None, exemplars=prompts)
    assert (record["id"], record["exemplar_count"], created) == ("cron", len(CRON), True)
    other = make_expert(tmp_path / "f", value=2)
    with pytest.raises(ServerError, match="belongs to another"):
        push_file(client, quiet(), other, name="cron", exemplars=None)
    record, _ = push_file(client, quiet(), other, name="cron", exemplars=None, replace=True)
    assert client._send("GET", "/v1/uploads").json()["data"] == []
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(ServerError, match="too short"):
        push_file(client, quiet(), tmp_path / "junk", name=None, exemplars=None)
    assert client._send("GET", "/v1/uploads").json()["data"] == []
