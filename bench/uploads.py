"""What an upload costs: `python -m bench.uploads`.

From the last byte of an expert file to the first token of the new expert, on a real server, idle and beside a running
stream whose tokens are timed too; and the memory of a server that receives and compresses a raw checkpoint of 1 GB.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from bench import report
from bench.served import serving
from examples.base import packaged_gguf

EXPERTS = report.ROOT / "examples" / "experts"
BASES = report.ROOT / ".cache" / "base"
"""Where the converted base is kept."""


class Stream(threading.Thread):
    """One long answer of the base, and when each of its pieces came."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._url = url
        self._over = threading.Event()
        self.times: list[float] = []

    def run(self) -> None:
        while not self._over.is_set():
            for _ in tokens(self._url, "base", "Tell me a long story about a railway.", 400):
                self.times.append(time.perf_counter())
                if self._over.is_set():
                    return

    def end(self) -> None:
        self._over.set()
        self.join(60)

    def gaps(self, since: float, until: float) -> list[float]:
        """Seconds between pieces that came in that time."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False) if since <= b <= until]


def tokens(url: str, model: str, prompt: str, max_tokens: int) -> Iterator[str]:
    """The pieces of an answer, as they come."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "stream": True,
    }
    with httpx.Client(timeout=600) as http, http.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if line.startswith("data: {") and (text := json.loads(line[6:])["choices"][0]["delta"].get("content")):
                yield text


def upload(url: str, file: Path, name: str) -> tuple[float, float]:
    """Send an expert file; (when its last byte had been written to the socket, when the answer was there)."""
    boundary = "b0undary"
    parts = f'--{boundary}\r\nContent-Disposition: form-data; name="name"\r\n\r\n{name}\r\n'
    parts += f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="e"\r\n\r\n'
    body = parts.encode() + file.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
    at = urlsplit(url)
    head = f"POST /v1/experts HTTP/1.1\r\nHost: {at.netloc}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
    head += f"Content-Type: multipart/form-data; boundary={boundary}\r\n\r\n"
    with socket.create_connection((at.hostname, at.port), timeout=600) as connection:
        connection.sendall(head.encode() + body[:-1])
        time.sleep(0.2)  # what was sent has been received: the last byte is the last one
        connection.sendall(body[-1:])
        sent = time.perf_counter()
        answer = b""
        while piece := connection.recv(1 << 16):
            answer += piece
        done = time.perf_counter()
    assert b" 201 " in answer.split(b"\r\n", 1)[0], answer
    return sent, done


def first_token(url: str, stream: bool, experts: list[Path]) -> list[dict[str, object]]:
    """One row per expert."""
    running = Stream(url) if stream else None
    rows: list[dict[str, object]] = []
    if running is not None:
        running.start()
        while len(running.times) < 20:
            time.sleep(0.05)
    for i, file in enumerate(experts):
        name = f"{file.stem}-{int(stream)}-{i}"
        calm = time.perf_counter()
        time.sleep(2.0)
        began = time.perf_counter()
        sent, published = upload(url, file, name)
        next(tokens(url, name, "hello", 1))
        told = time.perf_counter()
        row: dict[str, object] = {
            "expert": file.stem,
            "bytes": file.stat().st_size,
            "beside a stream": stream,
            "last byte to 201 (s)": published - sent,
            "201 to first token (s)": told - published,
            "last byte to first token (s)": told - sent,
        }
        if running is not None:
            before, during = running.gaps(calm, began), running.gaps(began, told)
            row |= {
                "gap before, median (ms)": 1e3 * statistics.median(before),
                "gap before, worst (ms)": 1e3 * max(before),
                "gap during, median (ms)": 1e3 * statistics.median(during),
                "gap during, worst (ms)": 1e3 * max(during),
            }
        rows.append(row)
        httpx.delete(f"{url}/v1/experts/{name}").raise_for_status()
    if running is not None:
        running.end()
    return rows


@contextmanager
def a_server() -> Iterator[tuple[str, Path]]:
    """A fresh server with nothing cached but the base: its address, and its data folder."""
    with tempfile.TemporaryDirectory(prefix="bench-uploads-") as folder:
        root = Path(folder)
        BASES.mkdir(parents=True, exist_ok=True)
        (root / "cache").mkdir()
        (root / "cache" / "base").symlink_to(BASES)
        folders: list[str | Path] = ["--data-dir", root / "data", "--cache-dir", root / "cache"]
        with serving("--base", packaged_gguf(), "--base-name", "base", *folders) as url:
            yield url, root / "data"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.uploads", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two experts; writes no results")
    given = parser.parse_args()
    experts = sorted(EXPERTS.glob("*.safetensors"))[: 2 if given.quick else None]
    rows: list[dict[str, object]] = []
    for stream in (False, True):
        with a_server() as (url, _):
            rows += first_token(url, stream, experts)
    report.show(rows, [])


if __name__ == "__main__":
    main()
