"""What the HTTP layer costs: `python -m bench.http_overhead`.

A server process as the product serves, around an engine that computes nothing, is asked over loopback by this process
through a bare socket. Timed is a request for one token, one after the other, from the last byte sent to the last byte
received; the client's share is what the same exchange takes with a server that answers fixed bytes. Streams are
counted by the server's own processor time, so that neither the client nor another process counts.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bench import report
from tests.robustness.dummy_server import Running, dummy_server

TOKENS = 1000
_TICKS = os.sysconf("SC_CLK_TCK")


def request(path: str, body: dict[str, Any]) -> bytes:
    """The bytes of a request on a connection that stays open."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


def exchange(connection: socket.socket, asked: bytes) -> bytes:
    """Send a request and read its whole answer, which tells its length."""
    connection.sendall(asked)
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += connection.recv(1 << 16)
    head, _, body = answer.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n", 1)[0])
    while len(body) < length:
        body += connection.recv(1 << 16)
    assert b" 200 " in head[:20], answer
    return head + b"\r\n\r\n" + body


def times(port: int, asked: bytes, n: int) -> tuple[np.ndarray[Any, np.dtype[np.float64]], bytes]:
    """Milliseconds of `n` exchanges, and the last answer."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(50):
            answer = exchange(connection, asked)
        taken = []
        for _ in range(n):
            began = time.perf_counter()
            exchange(connection, asked)
            taken.append(time.perf_counter() - began)
    return np.array(taken) * 1000, answer


@contextmanager
def echo(answer: bytes) -> Iterator[int]:
    """A server that answers every read with the same bytes; its port."""

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while connection.recv(1 << 16):
                connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        yield listener.getsockname()[1]


def stream(port: int, asked: bytes) -> int:
    """Read one stream to its end; how many pieces of text came."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(asked)
        answer = b""
        while b"data: [DONE]" not in answer[-64:]:
            received = connection.recv(1 << 16)
            assert received, answer[-200:]
            answer += received
    return answer.count(b'"text":"x"') + answer.count(b'"content":"x"')


def processor_seconds(server: Running) -> float:
    """What the server's process has used so far, on all its threads."""
    fields = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def measure(n: int, streams: int) -> tuple[list[dict[str, Any]], list[report.Bar]]:
    """Rows and bars of the report."""
    rows: list[dict[str, Any]] = []
    bars: list[report.Bar] = []
    base: dict[str, Any] = {"model": "dummy-base", "temperature": 0}
    asks = {
        "/v1/completions": base | {"prompt": "hello"},
        "/v1/chat/completions": base | {"messages": [{"role": "user", "content": "hello"}]},
    }
    with tempfile.TemporaryDirectory() as folder, dummy_server(Path(folder), DUMMY_LENGTH=str(TOKENS)) as server:
        for path, ask in asks.items():
            taken, answer = times(server.port, request(path, ask | {"max_tokens": 1}), n)
            with echo(answer) as port:
                own, _ = times(port, request(path, ask | {"max_tokens": 1}), n)
            cost = {f"p{p}": float(np.percentile(taken, p)) for p in (50, 99)}
            streamed = request(path, ask | {"max_tokens": TOKENS, "stream": True})
            stream(server.port, streamed)
            before = processor_seconds(server)
            with ThreadPoolExecutor(4) as pool:
                tokens = sum(pool.map(lambda _, s=streamed: stream(server.port, s), range(streams)))
            spent = processor_seconds(server) - before
            assert tokens == streams * TOKENS
            rate = tokens / spent
            rows.append(
                {"route": path, "p50_ms": cost["p50"], "p99_ms": cost["p99"], "client_p50_ms": float(np.median(own)),
                 "client_p99_ms": float(np.percentile(own, 99)), "tokens_per_core_second": rate}
            )  # fmt: skip
            name = path.removeprefix("/v1/")
            bars += [
                report.bar(f"http-{name}-{p}", f"HTTP, {name}, {p} ms", cost[p] - float(np.median(own)), "<=", 2.0)
                for p in ("p50", "p99")
            ]
            bars.append(
                report.bar(f"http-{name}-stream", f"HTTP, {name}, streamed tokens/s per core", rate, ">=", 2000.0)
            )
    return rows, bars


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.http_overhead", description=__doc__)
    parser.add_argument("--requests", type=int, default=2000, help="timed, of each kind")
    parser.add_argument("--streams", type=int, default=40, help=f"of {TOKENS} tokens, of each kind, four at a time")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder of the result")
    given = parser.parse_args()
    rows, bars = measure(given.requests, given.streams)
    report.write(
        "http_overhead",
        f"python -m bench.http_overhead {shlex.join(sys.argv[1:])}".rstrip(),
        rows,
        bars,
        folder=given.out,
    )
    report.show(rows, bars, title="the HTTP layer")
    return 0 if all(bar["met"] for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
