"""Where the commands of a page are run: a folder with what the pages speak of, and a server of its own."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from tests.docs.blocks import ROOT, Block
from tests.store.redis_server import RedisServer
from tests.zygote import Zygote, clean_environment

ADDRESS = "127.0.0.1:8000"
REDIS = "redis://redis:6379/0"
KEY = "an-administrators-key"

SMALLER = {
    "8GiB": "64MiB",
    "4GiB": "64MiB",
    "[504, 6376, 314]": "[84, 104, 101]",  # the tiny base knows bytes only
}
"""What is written for a real base, and what the tiny one takes in its place. All else is run as it stands."""

_ASKS_A_SERVER = re.compile(
    rf"{re.escape(ADDRESS)}|switchyard (?!serve|compress|merge|inspect|keygen|sign|plan|store|--help)\w"
)
_SERVE = "switchyard serve --base ./llama --base-name smollm2-135m-instruct --experts examples/experts"
_SHELL = """\
set -euo pipefail -o allexport
[ ! -e "$SANDBOX/.state" ] || source "$SANDBOX/.state"
cd "$SANDBOX"
{commands}
export -p >"$SANDBOX/.state"
echo {name} >>"$SANDBOX/.ran"
"""


class Sandbox:
    """The folder, the environment and the servers of one page."""

    def __init__(self, folder: Path, world: Path, cache: Path, zygote: Zygote, *, keys: bool) -> None:
        self._folder = folder
        self._redis: RedisServer | None = None
        self._serving = False
        for item in world.iterdir():
            (shutil.copytree if item.is_dir() else shutil.copy)(item, folder / item.name)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._env = clean_environment() | {
            "PATH": f"{self._shims()}:{os.environ['PATH']}",
            "HOME": str(folder / "home"),
            "ZYGOTE": str(zygote.socket),
            "SANDBOX": str(folder),
            "SANDBOX_PORT": str(self._port),
            "SANDBOX_SCRIPT": str(folder / ".block.py"),
            "SWITCHYARD_SERVER": f"http://127.0.0.1:{self._port}",
            "SWITCHYARD_DATA_DIR": str(folder / "data"),
            "SWITCHYARD_CACHE_DIR": str(cache),
            "SWITCHYARD_FEATURE_LAYER": "2",
            "SWITCHYARD_KV_BYTES": "64MiB",
            # Nothing is measured or compiled at start.
            "SWITCHYARD_MODE": "merged",
            "SWITCHYARD_KERNELS": "reference",
            # Else matplotlib looks for fonts anew on every page.
            "MPLCONFIGDIR": str(ROOT / ".cache" / "matplotlib"),
        }
        if keys:
            self._env |= {"SWITCHYARD_API_KEYS": KEY, "SWITCHYARD_API_KEY": KEY}

    @property
    def ran(self) -> list[str]:
        """Names of the blocks that came to their end."""
        record = self._folder / ".ran"
        return record.read_text().split() if record.exists() else []

    def run(self, blocks: Iterable[Block]) -> None:
        """Run blocks one after the other; variables that they set stay.

        Raises:
            AssertionError: a command failed.
        """
        for block in blocks:
            if _ASKS_A_SERVER.search(block.commands.split("switchyard serve")[0]) and not self._serving:
                self._bash(
                    "switchyard serve --base ./llama --base-name smollm2-135m-instruct --experts examples/experts", "-"
                )
                self._serving = True
            self._serving |= "switchyard serve" in block.commands
            commands = self._here(block.commands)
            if block.language == "python":
                (self._folder / ".block.py").write_text(commands, encoding="utf-8")
                commands = 'python "$SANDBOX_SCRIPT"'
            self._bash(commands, f"{block.page}:{block.line}")

    def close(self) -> None:
        """End what the page has started."""
        pid = self._folder / "server.pid"
        if pid.exists():
            with suppress(ProcessLookupError):
                os.kill(int(pid.read_text()), signal.SIGKILL)
        if self._redis is not None:
            self._redis.close()

    def _bash(self, commands: str, name: str) -> None:
        done = subprocess.run(
            ["bash", "-c", _SHELL.format(commands=commands, name=name)], cwd=self._folder, env=self._env,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        log = self._folder / "server.log"
        told = log.read_text(errors="replace")[-3000:] if log.exists() else ""
        assert done.returncode == 0, f"{name} failed:\n{commands}\n{done.stdout}\n{done.stderr}\nserver:\n{told}"

    def _here(self, commands: str) -> str:
        """The commands with the addresses and folders of this sandbox."""
        if REDIS in commands:
            if self._redis is None:
                self._redis = RedisServer(self._folder / "redis")
                self._redis.start()
            commands = commands.replace(REDIS, self._redis.url)
        commands = commands.replace(ADDRESS, f"127.0.0.1:{self._port}")
        commands = re.sub(r"(?<=\s)/data\b", self._env["SWITCHYARD_DATA_DIR"], commands)
        commands = re.sub(r"(?<=\s)/cache\b", self._env["SWITCHYARD_CACHE_DIR"], commands)
        for written, smaller in SMALLER.items():
            commands = commands.replace(written, smaller)
        return commands

    def _shims(self) -> Path:
        folder = self._folder / "bin"
        folder.mkdir()
        shim = ROOT / "tests/docs/shims/shim.py"
        curl = shutil.which("curl")
        scripts = {
            **{name: f'exec {sys.executable} -ISs {shim} {name} "$@"' for name in ("switchyard", "python", "python3")},
            # What the server refuses is a failure.
            "curl": f'exec {curl} --fail-with-body "$@"',
        }
        for name, line in scripts.items():
            (folder / name).write_text(f"#!/bin/sh\n{line}\n")
            (folder / name).chmod(stat.S_IRWXU)
        return folder
