"""What an upload costs: `python -m bench.uploads`.

From the last byte of an expert file to the first token of the new expert, on a real server, idle and beside a running
stream whose tokens are timed too; and the memory of a server that receives and compresses a raw checkpoint of 1 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import statistics
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
from rich.console import Console

from bench import report
from bench.served import serving_process
from examples.base import packaged_gguf
from server.client import Client
from server.pushing import upload_file
from store.checkpoint import open_checkpoint
from store.task_vector import load_float32

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
            "load of the machine": os.getloadavg()[0],
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
def a_server() -> Iterator[tuple[str, int]]:
    """A fresh server with nothing cached but the base: its address, and its process."""
    with tempfile.TemporaryDirectory(prefix="bench-uploads-") as folder:
        root = Path(folder)
        BASES.mkdir(parents=True, exist_ok=True)
        (root / "cache").mkdir()
        (root / "cache" / "base").symlink_to(BASES)
        folders: list[str | Path] = ["--data-dir", root / "data", "--cache-dir", root / "cache"]
        with serving_process("--base", packaged_gguf(), "--base-name", "base", *folders) as (url, process):
            yield url, process


class Memory(threading.Thread):
    """Looks at a process and its children ten times a second."""

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self._process = process
        self._over = threading.Event()
        self.server = self.children = 0
        """Most bytes in memory of the process itself, and of one of its children that was started since."""
        self._before = set(_children(process))

    def run(self) -> None:
        while not self._over.wait(0.1):
            self.server = max(self.server, resident(self._process))
            new = [child for child in _children(self._process) if child not in self._before]
            self.children = max([self.children, *map(resident, new)])

    def end(self) -> None:
        self._over.set()
        self.join()


def resident(process: int) -> int:
    """Bytes of anonymous memory of a process; what it maps of files the kernel takes back when it likes."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in text.splitlines() if line.startswith(("RssAnon", "RssShmem")))


def _children(process: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{process}/task").iterdir())
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []


def write_checkpoint(base: Path, target: Path, tensors: int | None) -> None:
    """A fine-tune of a base, as large as can be: float64. `tensors`: only so many, which is no fine-tune."""
    checkpoint = open_checkpoint(base)
    names = list(checkpoint.tensors)[:tensors]
    table, offset = {}, 0
    for name in names:
        tensor = checkpoint.tensors[name]
        stop = offset + 8 * tensor.span.numel
        table[name] = {"dtype": "F64", "shape": list(tensor.shape), "data_offsets": [offset, stop]}
        offset = stop
    head = json.dumps(table).encode()
    rng = np.random.default_rng(0)
    with target.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for name in names:
            values = load_float32(checkpoint.tensors[name]).numpy().astype(np.float64)
            values += rng.standard_normal(values.shape, dtype=np.float32) * 1e-3
            file.write(values.tobytes())


def raw_checkpoint(*, quick: bool) -> dict[str, object]:
    """Upload a raw checkpoint, let the server compress it, and ask the expert; one row."""
    with a_server() as (url, process), tempfile.TemporaryDirectory(prefix="bench-raw-") as folder:
        next(tokens(url, "base", "hello", 1))
        file = Path(folder) / "model.safetensors"
        write_checkpoint(next(BASES.iterdir()), file, 1 if quick else None)
        before = resident(process)
        memory = Memory(process)
        memory.start()
        client = Client(url)
        began = time.perf_counter()
        upload_id = upload_file(client, Console(quiet=True), file)
        uploaded = time.perf_counter()
        job = httpx.post(f"{url}/v1/jobs", json={"uploads": [upload_id], "name": "raw"}, timeout=60).json()
        during_upload = memory.server
        while job["status"] in ("queued", "running"):
            time.sleep(0.2)
            job = httpx.get(f"{url}/v1/jobs/{job['id']}", timeout=60).json()
        done = time.perf_counter()
        if not quick:
            assert job["status"] == "succeeded", job
            next(tokens(url, "raw", "hello", 1))
        memory.end()
        return {
            "raw checkpoint (bytes)": file.stat().st_size,
            "upload (s)": uploaded - began,
            "compress and publish (s)": done - uploaded,
            "expert (bytes)": (job["report"] or {}).get("bytes"),
            "server before (MB)": before / 1e6,
            "server grew, upload (MB)": (during_upload - before) / 1e6,
            "server grew, in all (MB)": (memory.server - before) / 1e6,
            "the job's process (MB)": memory.children / 1e6,
        }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.uploads", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one expert, one tensor; writes no results")
    given = parser.parse_args()
    experts = sorted(EXPERTS.glob("*.safetensors"))[: 1 if given.quick else None]
    rows: list[dict[str, object]] = []
    for stream in (False, True):
        with a_server() as (url, _):
            rows += first_token(url, stream, experts)
    raw = raw_checkpoint(quick=given.quick)
    latency = "last byte to first token (s)"
    calm, busy = (
        statistics.median(float(str(row[latency])) for row in rows if row["beside a stream"] is stream)
        for stream in (False, True)
    )
    grew = float(str(raw["server grew, in all (MB)"]))
    bars = [
        report.bar("uploads.first_token", "last byte to first token, 6.6 MB file, idle, median (s)", calm, "<=", 1),
        report.bar("uploads.first_token_busy", "the same beside a running stream (s)", busy, "<=", 1),
        report.bar("uploads.memory", "server grows with a raw checkpoint of 1 GB (MB)", grew, "<=", 200),
    ]
    report.show(rows)
    report.show([raw], bars)
    if not given.quick:
        report.write("uploads", shlex.join(["python", "-m", "bench.uploads", *sys.argv[1:]]), [*rows, raw], bars)


if __name__ == "__main__":
    main()
