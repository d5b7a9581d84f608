"""Clients that mean no good, against a real server process: refused in bounded time, and nobody else notices."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import httpx
import pytest

from tests.robustness.dummy_server import Running, dummy_server

PATIENCE = "1.5"
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
DEADLINE = 60.0
"""Far beyond what the server grants: what is tested is that it gives up at all."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("hostile")
    limits = {"SWITCHYARD_MAX_BODY_BYTES": "1MB", "SWITCHYARD_BODY_BYTES": "4MB"}
    with dummy_server(folder, SWITCHYARD_CLIENT_SECONDS=PATIENCE, **limits) as running:
        yield running


@pytest.fixture(autouse=True)
def _undisturbed(server: Running) -> Iterator[None]:
    """Whatever happened, others are served, nothing of it runs on, and memory stays bounded."""
    before = server.resident
    yield
    body = {"model": "dummy-base", "prompt": "hello", "max_tokens": 4}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=DEADLINE)
    assert answer.status_code == 200, answer.text
    until_idle(server)
    assert server.resident < before + (64 << 20)


def until_idle(server: Running) -> None:
    """Until no answer that nobody waits for runs on."""
    until(lambda: not httpx.get(f"{server.url}/debug/engine", timeout=DEADLINE).json()["lanes"])


def talk(server: Running, *pieces: bytes, drip: bytes = b"") -> bytes:
    """Send some bytes, then drip others until the server closes; what it answered."""
    answer = b""
    deadline = time.monotonic() + DEADLINE
    with socket.create_connection(("127.0.0.1", server.port), timeout=DEADLINE) as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
            connection.settimeout(0.1)
            while True:
                assert time.monotonic() < deadline, "the connection stays open"
                try:
                    received = connection.recv(1 << 16)
                except TimeoutError:
                    if drip:
                        connection.sendall(drip)
                    continue
                if not received:
                    return answer
                answer += received
        except (ConnectionResetError, BrokenPipeError):
            return answer


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def code(answer: bytes) -> str:
    found: str = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"]
    return found


@pytest.mark.parametrize("begun", [HEAD + b"x-a: ", b"GET /a", b"POST /v1/completions HTTP/1.1\r\n"])
def test_a_head_that_drips_is_given_up(server: Running, begun: bytes) -> None:
    answer = talk(server, begun, drip=b"a")
    assert status(answer) == 408
    assert code(answer) == "request_timeout"


def test_a_head_that_never_comes_is_given_up(server: Running) -> None:
    assert talk(server) == b""
    assert talk(server, drip=b"\r\n") == b""


def test_a_second_head_that_drips_is_given_up(server: Running) -> None:
    answer = talk(server, b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\nGET /he", drip=b"a")
    assert status(answer) == 200
    assert b"408" in answer


@pytest.mark.parametrize("drip", [b"", b" "])
def test_a_body_that_drips_is_given_up(server: Running, drip: bytes) -> None:
    answer = talk(server, HEAD + b"content-length: 500000\r\n\r\n{", drip=drip)
    assert status(answer) == 408
    assert code(answer) == "request_timeout"


def test_a_form_that_drips_is_given_up(server: Running) -> None:
    head = b"POST /v1/experts HTTP/1.1\r\nhost: localhost\r\ncontent-type: multipart/form-data; boundary=b\r\n"
    part = b'--b\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\n'
    assert status(talk(server, head + b"content-length: 500000\r\n\r\n" + part, drip=b"a")) == 408


def test_large_bodies_at_once_are_bounded_together(server: Running) -> None:
    """Twenty clients send most of a body each and stop: memory for four is given, the others are told to come again."""
    head, part = HEAD + b"content-length: 1000000\r\n\r\n", b" " * 900_000
    with ExitStack() as stack:
        for _ in range(20):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=DEADLINE))
            with suppress(ConnectionResetError, BrokenPipeError):  # refused while it still sends
                connection.sendall(head + part)
        full = 'switchyard_failures_total{code="body_memory_full"}'
        until(lambda: (figure(server, full), figure(server, "switchyard_body_bytes") > 3.5e6) == (16, True))
        assert figure(server, "switchyard_body_bytes") <= figure(server, "switchyard_body_limit_bytes") == 4e6
        large = post(server, chat(b'"%s"' % (b"x" * 900_000)))
        assert (large.status_code, large.json()["error"]["code"]) == (503, "body_memory_full")
        assert int(large.headers["retry-after"]) > 0
        assert post(server, chat(b'"hello"')).status_code == 200
    until(lambda: figure(server, "switchyard_body_bytes") == 0)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def figure(server: Running, series: str) -> float:
    """One figure of /metrics; 0 if it is not there yet."""
    lines = httpx.get(f"{server.url}/metrics", timeout=DEADLINE).text.splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.rpartition(" ")[0] == series), 0.0)


@pytest.mark.parametrize(
    "headers",
    [
        b"x-a: " + b"a" * 300_000 + b"\r\n\r\n",
        b"".join(b"x-%d: a\r\n" % i for i in range(40_000)) + b"\r\n",
        b"x-a: " + b"a" * 3_000_000,
    ],
    ids=["one", "many", "endless"],
)
def test_huge_headers_are_refused(server: Running, headers: bytes) -> None:
    answer = talk(server, HEAD, headers)
    assert not answer or status(answer) == 431  # a reset may overtake the answer while we still send


def test_a_long_url_is_refused(server: Running) -> None:
    answer = talk(server, b"GET /" + b"a" * 300_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n")
    assert not answer or status(answer) in (404, 431)


def post(server: Running, body: bytes, *, path: str = "/v1/chat/completions", **headers: str) -> httpx.Response:
    given = {"content-type": "application/json"} | headers
    return httpx.post(f"{server.url}{path}", content=body, headers=given, timeout=DEADLINE)


def chat(content: bytes, rest: bytes = b"") -> bytes:
    return b'{"model": "dummy-base", "messages": [{"role": "user", "content": %s}]%s}' % (content, rest)


@pytest.mark.parametrize(
    ("body", "refusal"),
    [
        (b"[" * 200_000, None),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, None),
        (chat(b'"\xff\xfe"'), None),
        (chat(b'"\\ud800"'), "invalid_value"),
        (chat(b'"x"', b', "temperature": NaN'), None),
        (chat(b'"x"', b', "temperature": 1e999'), None),
        (chat(b'"x"', b', "max_tokens": ' + b"9" * 5000), None),
        (chat(b'"x"', b', "seed": -' + b"9" * 4000), None),
        (chat(b'"x"', b', "logit_bias": {"1": Infinity}'), None),
        (b"", None),
        (b"\x00", "invalid_json"),
    ],
    ids=["deep list", "deep object", "utf-8", "surrogate", "nan", "inf", "long", "longer", "bias", "empty", "nul"],
)
def test_json_that_is_none_is_refused(server: Running, body: bytes, refusal: str | None) -> None:
    answer = post(server, body)
    assert answer.status_code == 400, answer.text
    assert refusal in (None, answer.json()["error"]["code"])


def test_of_keys_that_come_twice_one_counts_and_is_checked(server: Running) -> None:
    assert post(server, chat(b'"x"', b', "max_tokens": 1, "max_tokens": "x"')).status_code == 400
    assert post(server, chat(b'"x"', b', "max_tokens": "x", "max_tokens": 1')).status_code == 200


def test_huge_prompts_are_refused(server: Running) -> None:
    too_long = post(server, chat(b'"' + b"x" * 900_000 + b'"'))
    assert (too_long.status_code, too_long.json()["error"]["code"]) == (400, "context_length_exceeded")
    too_large = post(server, chat(b'"' + b"x" * 1_100_000 + b'"'))
    assert (too_large.status_code, too_large.json()["error"]["code"]) == (413, "payload_too_large")


def test_what_is_pipelined_after_a_request_is_no_request(server: Running) -> None:
    answer = talk(server, b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n", b"\x00\xff garbage\r\n\r\n" * 50)
    # The garbage is read while the answer is on its way, and may end the connection before it; or after it, and is told
    # what it is. It is never answered like a request.
    told = re.findall(rb"HTTP/1\.1 (\d+)", answer)
    assert told in ([], [b"200"], [b"400"], [b"200", b"400"])


@pytest.mark.parametrize(
    "lengths",
    [
        b"content-length: -1\r\n",
        b"content-length: 99999999999999999999999\r\n",
        b"content-length: 2\r\ncontent-length: 3\r\n",
        b"content-length: 2\r\ntransfer-encoding: chunked\r\n",
        b"transfer-encoding: chunked, nonsense\r\n",
    ],
)
def test_lengths_that_cannot_be_are_refused(server: Running, lengths: bytes) -> None:
    answer = talk(server, HEAD + lengths + b"\r\n{}", drip=b" ")
    assert status(answer) in (400, 408, 413)


def test_a_body_that_is_shorter_than_announced_ends_with_its_client(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(HEAD + b"content-length: 1000\r\n\r\n{")


@pytest.mark.parametrize(
    ("boundary", "body"),
    [
        ("b", b"--b\r\n" * 100_000),
        ("b", b"--b\r\n" + b"x-a: " + b"a" * 500_000),
        ("b", b'--b\r\ncontent-disposition: form-data; name="' + b"n" * 400_000 + b'"\r\n\r\nx\r\n--b--\r\n'),
        ("b" * 5000, b"--" + b"b" * 5000),
        ("", b"----"),
    ],
    ids=["empty parts", "endless header", "long name", "long boundary", "no boundary"],
)
def test_absurd_forms_are_refused(server: Running, boundary: str, body: bytes) -> None:
    kind = f"multipart/form-data; boundary={boundary}"
    answer = post(server, body, path="/v1/experts", **{"content-type": kind})
    assert 400 <= answer.status_code < 500, answer.text


@pytest.mark.parametrize("reads", [True, False])
def test_streams_whose_client_vanishes_are_ended(server: Running, reads: bool) -> None:
    body = chat(b'"x"', b', "stream": true, "max_tokens": 4000')
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", server.port), timeout=DEADLINE) as connection:
            connection.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
            if reads:
                assert b"200 OK" in connection.recv(1000)
