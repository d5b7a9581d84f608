"""Python processes that start at once: forked from one that has imported everything already.

`python -m tests.zygote SOCKET` listens. Who connects sends its standard streams with `{"argv", "cwd", "env"}`, gets the
new process's id in one line, and its exit status in the next once it has ended; no such line means that it was killed.
`argv` begins with `switchyard`, or with `python` and a script. Importing torch and transformers takes seconds, forking
takes milliseconds.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent


def clean_environment() -> dict[str, str]:
    """This process's environment without settings of a server, for processes that must not depend on it."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SWITCHYARD_")}
    return kept | {"HF_HUB_OFFLINE": "1", "COLUMNS": "120", "OMP_WAIT_POLICY": "PASSIVE", "NO_COLOR": "1"}


class Forked:
    """A process of a zygote; a small part of what subprocess.Popen is."""

    def __init__(self, connection: socket.socket, output: IO[str]) -> None:
        self._lines = connection.makefile("r")
        connection.close()
        self.stdout = output
        self.pid = int(self._lines.readline())
        self.returncode: int | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self) -> None:
        line = self._lines.readline()
        self.returncode = int(line) if line else -signal.SIGKILL
        self._ended.set()

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        assert self.returncode is not None
        return self.returncode


class Zygote:
    """The process that forks, its socket, and all that came of it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="zygote-")  # paths of sockets are short
        self.socket = Path(self._folder.name) / "socket"
        command = [sys.executable, "-m", "tests.zygote", str(self.socket)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env={**environment, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def start(self, argv: Sequence[str | Path], *, cwd: Path, env: Mapping[str, str]) -> Forked:
        """Begin a process whose output and errors come by its `stdout`."""
        reading, writing = os.pipe()
        with socket.socket(socket.AF_UNIX) as connection, open(os.devnull) as nothing:
            connection.connect(str(self.socket))
            ask(connection, [str(word) for word in argv], cwd, env, [nothing.fileno(), writing, writing])
            os.close(writing)
            return Forked(connection.dup(), os.fdopen(reading, "r"))

    def close(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._folder.cleanup()


def ask(
    connection: socket.socket, argv: Sequence[str], cwd: Path, env: Mapping[str, str], streams: Sequence[int]
) -> None:
    message = json.dumps({"argv": argv, "cwd": str(cwd), "env": dict(env)}).encode()
    socket.send_fds(connection, [len(message).to_bytes(4, "big")], list(streams))
    connection.sendall(message)


def main(path: str) -> None:
    import openai  # noqa: F401

    import server.compressing
    import server.serving  # noqa: F401

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(64)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them here
        os.write(1, b"ready\n")
        while True:
            connection, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                become(connection)
            connection.close()


def become(connection: socket.socket) -> None:
    """Be the process that was asked for; never returns."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, streams, _, _ = socket.recv_fds(connection, 4, 3)
    with connection.makefile("rb") as wire:
        wanted: dict[str, Any] = json.loads(wire.read(int.from_bytes(head, "big")))
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(wanted["cwd"])
    os.environ.clear()
    os.environ.update(wanted["env"])
    connection.sendall(f"{os.getpid()}\n".encode())
    status = _run(wanted["argv"])
    for written in (sys.stdout, sys.stderr):
        written.flush()
    try:
        connection.sendall(f"{status}\n".encode())
    finally:  # nobody may listen any more
        os._exit(status)


def _run(argv: list[str]) -> int:
    try:
        if argv[0] == "switchyard":
            from server.cli import main as switchyard

            sys.argv = argv
            switchyard()
        else:
            sys.argv = argv[1:]
            runpy.run_path(argv[1], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    main(sys.argv[1])
