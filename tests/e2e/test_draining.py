"""A server that is told to stop, as an orchestrator does it, while it streams an answer."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse, IncompleteRead
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.e2e.conftest import ServerProcess, until_ready
from tests.tiny import save_base
from tests.zygote import Zygote, clean_environment

CHOICES = 8
TOKENS = 480


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("draining") / "base")


def start(zygote: Zygote, base: Path, folder: Path, drain_seconds: int) -> ServerProcess:
    argv = ("switchyard", "serve", "--port", "0", "--base", base, "--data-dir", folder, "--cache-dir", folder,
            "--kv-bytes", "32MiB", "--mode", "merged", "--kernels", "reference",
            "--drain-seconds", str(drain_seconds))  # fmt: skip
    return until_ready(zygote.start(argv, cwd=folder, env=clean_environment()))


@contextmanager
def answer_in_progress(server: ServerProcess) -> Iterator[HTTPResponse]:
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
    body = {"model": "base", "prompt": "a long story", "max_tokens": TOKENS, "n": CHOICES, "stream": True,
            "logprobs": 20, "ignore_eos": True}  # fmt: skip
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
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


def test_what_takes_longer_is_broken_off_and_the_client_notices(zygote: Zygote, base: Path, tmp_path: Path) -> None:
    server = start(zygote, base, tmp_path, drain_seconds=0)
    with answer_in_progress(server) as answer:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=60) == 0
        with pytest.raises((IncompleteRead, ConnectionResetError)):
            answer.read()
