"""A server that is told to stop, as an orchestrator does it, while it streams an answer."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPResponse, IncompleteRead
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.e2e.conftest import ServerProcess, until_ready
from tests.tiny import save_base
from tests.zygote import Zygote, clean_environment

CHOICES = 8
TOKENS = 480
PROMPT = {"prompt": "a long story", "logprobs": 20}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("draining") / "base")


def start(zygote: Zygote, base: Path, folder: Path, drain_seconds: int) -> ServerProcess:
    argv = ("switchyard", "serve", "--port", "0", "--base", base, "--data-dir", folder, "--cache-dir", folder,
            "--kv-bytes", "32MiB", "--mode", "merged", "--kernels", "reference",
            "--drain-seconds", str(drain_seconds))  # fmt: skip
    return until_ready(zygote.start(argv, cwd=folder, env=clean_environment()))


@contextmanager
def answer_in_progress(
    server: ServerProcess, path: str = "/v1/completions", asked: dict[str, Any] = PROMPT, **how: Any
) -> Iterator[HTTPResponse]:
    """A stream of which nothing has been read but the first event.

    Its events take more room than there is between server and client, so that the server cannot have written all of
    them before the client reads on.
    """
    address = urlsplit(server.url)
    assert address.hostname is not None
    connection = HTTPConnection(address.hostname, address.port, timeout=120)
    connection.sock = socket.socket()
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.sock.connect((address.hostname, address.port))
    body = {"model": "base", "max_tokens": TOKENS, "n": CHOICES, "stream": True, "ignore_eos": True, **asked, **how}
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200
    assert answer.readline().startswith(b"data: {")
    yield answer
    connection.close()


def wait_until_refused(server: ServerProcess) -> None:
    address = urlsplit(server.url)
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection((address.hostname, address.port), timeout=60).close()
        except ConnectionRefusedError:
            return
        assert time.monotonic() < deadline, "the server takes connections still"
        time.sleep(0.01)


def test_a_stream_ends_whole_while_new_requests_are_refused(zygote: Zygote, base: Path, tmp_path: Path) -> None:
    server = start(zygote, base, tmp_path, drain_seconds=600)
    with answer_in_progress(server) as answer:
        server.process.send_signal(signal.SIGTERM)
        wait_until_refused(server)
        assert server.process.poll() is None
        events = [line.removeprefix(b"data: ") for line in answer.read().split(b"\n") if line]
    assert events.pop() == b"[DONE]"
    ended = [choice["finish_reason"] for event in events for choice in json.loads(event)["choices"]]
    assert sum(reason is not None for reason in ended) == CHOICES
    assert server.process.wait(timeout=60) == 0


def test_what_takes_longer_ends_with_an_error_that_says_why(zygote: Zygote, base: Path, tmp_path: Path) -> None:
    """Streams of either kind by an event, what is not streamed by a refusal; nobody keeps the server by not reading."""
    server = start(zygote, base, tmp_path, drain_seconds=0)
    chat = {"messages": [{"role": "user", "content": "a long story"}]}
    with (
        answer_in_progress(server) as stream,
        answer_in_progress(server, "/v1/chat/completions", chat, logprobs=True, top_logprobs=20) as talk,
        answer_in_progress(server) as deaf,
        ThreadPoolExecutor(1) as pool,
    ):
        # So many that no machine is done with them before the signal.
        body = {"model": "base", "prompt": ["a long story"] * 16, "n": CHOICES, "max_tokens": TOKENS}
        whole = pool.submit(httpx.post, f"{server.url}/v1/completions", json=body | {"ignore_eos": True}, timeout=120)
        until_waiting(server, 16)
        server.process.send_signal(signal.SIGTERM)
        wait_until_refused(server)
        for answer in (stream, talk):
            *chunks, last = (line.removeprefix(b"data: ") for line in answer.read().split(b"\n") if line)
            assert json.loads(last)["error"]["code"] == "shutting_down"
            assert all("choices" in json.loads(chunk) for chunk in chunks)
        refused = whole.result()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert int(refused.headers["retry-after"]) > 0
        assert server.process.wait(timeout=60) == 0
        with suppress(IncompleteRead, ConnectionResetError):  # it depends on what had room on the way
            assert b"shutting_down" in deaf.read().splitlines()[-2]


def until_waiting(server: ServerProcess, requests: int) -> None:
    """Until the engine has so many more than it had room for."""
    deadline = time.monotonic() + 60
    while httpx.get(f"{server.url}/debug/engine", timeout=60).json()["stats"]["waiting"] < requests:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_server_that_runs_bounds_what_clients_may_send_it(zygote: Zygote, base: Path, tmp_path: Path) -> None:
    server = start(zygote, base, tmp_path, drain_seconds=0)
    refused = httpx.get(f"{server.url}/health", headers={"x-large": "x" * (1 << 17)}, timeout=60)
    assert refused.status_code == 431
    assert refused.json()["error"]["code"] == "headers_too_large"
    assert server.stop() == 0
