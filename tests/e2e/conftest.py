"""A real server process, started by the command line as a user would start it."""

from __future__ import annotations

import json
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

from tests.tiny import save_base, save_tuned
from tests.zygote import Forked, Zygote, clean_environment

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


THEMES = {
    "rivers": ["the river {} is long", "how deep is the water of {}", "boats sail along the {}"],
    "numbers": ["add 4{} and 17", "what is 3{} times 12", "subtract 9 from 8{}"],
}


@dataclass(frozen=True)
class World:
    """A base, two fine-tunes of it as expert files made by `switchyard compress`, and their exemplars."""

    base: Path
    experts: dict[str, Path]
    exemplars: dict[str, Path]
    report: str


@pytest.fixture(scope="session")
def world(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    base = save_base(folder / "base")
    experts, exemplars, report = {}, {}, ""
    for seed, (name, forms) in enumerate(THEMES.items(), start=1):
        tuned = save_tuned(base, folder / f"tuned-{name}", seed=seed)
        exemplars[name] = folder / f"{name}.jsonl"
        lines = [json.dumps({"prompt": form.format(i)}) for i in range(8) for form in forms]
        exemplars[name].write_text("\n".join(lines))
        experts[name] = folder / f"{name}.safetensors"
        compressing = zygote.start([
            "switchyard", "compress", "--base", base, "--tuned", tuned, "--out", experts[name], "--density", "0.3",
            "--name", name, "--exemplars", exemplars[name], "--description", f"knows {name}",
            "--cache-dir", folder / "cache", "--author", "ada", "--license", "MIT", "--tag", name, "--meta", "seed=1",
        ], cwd=ROOT, env=clean_environment())  # fmt: skip
        told = compressing.stdout.read()
        assert compressing.wait(timeout=300) == 0, told
        report += told
    return World(base, experts, exemplars, report)


@pytest.fixture
def options(world: World, tmp_path: Path) -> list[str | Path]:
    return ["--base", world.base, "--base-name", "tiny", "--data-dir", tmp_path / "data", "--cache-dir",
            tmp_path / "cache", "--feature-layer", "2", "--kv-bytes", "8MiB"]  # fmt: skip
