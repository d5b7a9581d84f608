"""A real server process, started by the command line as a user would start it."""

from __future__ import annotations

import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from openai import OpenAI

from tests.zygote import Forked, clean_environment

ROOT = Path(__file__).parents[2]
Start = Callable[..., "ServerProcess"]


def switchyard(*arguments: str | Path, typed: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one verb of the command line, with `typed` as its input."""
    return subprocess.run(
        [sys.executable, "-m", "server.cli", *map(str, arguments)],
        cwd=ROOT,
        env=clean_environment() | environment,
        input=typed,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@dataclass
class ServerProcess:
    """`switchyard serve`, its screen and its address."""

    process: subprocess.Popen[str] | Forked
    screen: list[str] = field(default_factory=list)
    url: str = ""

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(timeout=30)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


def start_server(*arguments: str | Path, ready_within: float = 240.0) -> ServerProcess:
    """Start a server on a free port and wait until it says that it is ready, and has printed its examples."""
    command = [sys.executable, "-m", "server.cli", "serve", "--port", "0", *map(str, arguments)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return until_ready(process, ready_within)


def until_ready(process: subprocess.Popen[str] | Forked, seconds: float = 240.0) -> ServerProcess:
    """A server that was just started, once it says that it is ready, and has printed its examples."""
    server = ServerProcess(process)
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            server.screen.append(line.rstrip("\n"))
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    deadline = time.monotonic() + seconds
    while True:
        line = lines.get(timeout=max(0.1, deadline - time.monotonic()))
        if line is None:
            raise AssertionError("the server ended:\n" + "\n".join(server.screen))
        if found := re.search(r"ready after .* at (http://\S+)", line):
            server.url = found.group(1)
        if server.url and line.startswith("curl ") and "tallest mountain" in line:
            return server


@pytest.fixture
def start() -> Iterator[Start]:
    """`start(...)` as `start_server`; everything started is gone after the test."""
    started: list[ServerProcess] = []

    def begin(*arguments: str | Path) -> ServerProcess:
        server = start_server(*arguments)
        started.append(server)
        return server

    yield begin
    for server in started:
        if server.process.poll() is None:
            server.kill()
