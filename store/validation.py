"""Checks expert files in processes of their own, so that a hostile one can take down nothing but its own check.

A checker (`store.checker`) is started once, with everything imported. For each file it forks a process with limits on
time and memory, which takes milliseconds; that process gets the open file, and a pipe for its verdict.
"""

from __future__ import annotations

import json
import logging
import math
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import store
from store.errors import ExpertFileError, StoreError, WrongBaseError
from store.expert_header import ExpertHeader, header_from_json
from store.manifest import BaseManifest

_log = logging.getLogger(__name__)

_GRACE_SECONDS = 30.0
"""Beyond the wall time that a check limits itself to: a checker may still be importing, a machine be busy."""


@dataclass(frozen=True)
class Limits:
    """What the check of one file may use.

    Attributes:
        cpu_seconds: processor time.
        wall_seconds: time.
        memory: bytes of address space.
    """

    cpu_seconds: int
    wall_seconds: int
    memory: int


def limits_for(base: BaseManifest) -> Limits:
    """Several times what a sound expert of that base needs: every tensor of it is decoded once, one at a time."""
    sizes = [math.prod(shape) for shape in base.tensors.values()] or [1]
    seconds = 30 + sum(sizes) // 5_000_000
    return Limits(cpu_seconds=seconds, wall_seconds=4 * seconds, memory=(1 << 30) + 40 * max(sizes))


class Validator:
    """Checks the expert files of one base. Thread-safe.

    Args:
        base: what they are checked against.
        limits: of each check; None for `limits_for(base)`.
        module: what runs in the checker's process.
    """

    def __init__(self, base: BaseManifest, limits: Limits | None = None, *, module: str = "store.checker") -> None:
        self._base = base
        self._limits = limits or limits_for(base)
        self._module = module
        self._door = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def start(self) -> None:
        """Start the checker, if it is not there; it is ready a moment later.

        Raises:
            StoreError: it cannot be started.
        """
        with self._door:
            self._start()

    def close(self) -> None:
        """Stop the checker; checks in progress end by themselves, within their limits."""
        with self._door:
            self._stop()

    def check(self, path: Path) -> ExpertHeader:
        """Check everything there is to check about a file, as `store.expert_file.validate` does. Blocks.

        Raises:
            WrongBaseError: the expert was made for another base.
            ExpertFileError: the file is corrupt, hostile or unsupported, or its check exceeds the limits.
            StoreError: there is no checker, or it does not answer.
        """
        try:
            with path.open("rb") as file:
                verdict = self._verdict(file)
        except OSError as error:
            raise StoreError(f"the file cannot be checked: {error.strerror}") from error
        if (fault := verdict.get("error")) is not None:
            kind = WrongBaseError if fault["code"] == WrongBaseError.code else ExpertFileError
            raise kind(fault["message"], param=fault["param"], code=fault["code"])
        if "header" in verdict:
            return header_from_json(verdict["header"])
        raise self._too_much(verdict.get("died", 0))

    def _verdict(self, file: IO[bytes]) -> dict[str, Any]:
        reader, writer = os.pipe()
        with os.fdopen(reader, "rb", buffering=0) as answer:
            try:
                self._hand_over(file.fileno(), writer)
            finally:
                os.close(writer)
            said = _read(answer, time.monotonic() + self._limits.wall_seconds + _GRACE_SECONDS)
        if said is None:
            self.close()  # whoever comes next starts another
        lines = (said or b"").splitlines()
        if not lines:
            raise StoreError("the checker of expert files has failed; try again")
        found: dict[str, Any] = json.loads(lines[-1])
        return found

    def _hand_over(self, *descriptors: int) -> None:
        with self._door:
            for attempt in range(2):
                self._start()
                assert self._socket is not None
                try:
                    socket.send_fds(self._socket, [b"."], descriptors)
                    return
                except OSError:  # it was killed, for want of memory perhaps
                    self._stop()
                    if attempt:
                        raise

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self._stop()
        ours, theirs = socket.socketpair()
        try:
            with tempfile.TemporaryFile() as settings, theirs:
                settings.write(json.dumps({"base": asdict(self._base), "limits": asdict(self._limits)}).encode())
                settings.seek(0)
                self._process = subprocess.Popen(
                    [sys.executable, "-m", self._module, str(theirs.fileno())],
                    stdin=settings,
                    stdout=subprocess.DEVNULL,
                    env=_environment(),
                    pass_fds=[theirs.fileno()],
                )
        except OSError as error:
            ours.close()
            raise StoreError(f"cannot start the checker of expert files: {error.strerror}") from error
        self._socket = ours

    def _stop(self) -> None:
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._socket = None

    def _too_much(self, died: int) -> ExpertFileError:
        limits = self._limits
        reasons = {
            0: f"needs more than {limits.memory >> 20} MiB of memory",
            -signal.SIGXCPU: f"takes more than {limits.cpu_seconds} s of processor time",
            -signal.SIGALRM: f"takes more than {limits.wall_seconds} s",
        }
        reason = reasons.get(died, f"ends in a crash ({died})")
        _log.warning("the check of an expert file %s: it is refused", reason)
        return ExpertFileError(f"the check of this file {reason}: it is refused", param="file", code="check_failed")


def _environment() -> dict[str, str]:
    """What the checker needs, and no more: a server's environment holds keys."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
    # One thread: a fork has no others, and pools of them reserve memory.
    alone = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return kept | alone | {"PYTHONPATH": str(Path(store.__file__).parents[1])}


def _read(answer: IO[bytes], deadline: float) -> bytes | None:
    """All that is written until the other side closes; None where that takes too long."""
    said = b""
    waiting = select.poll()  # select.select knows no descriptor beyond 1,023
    waiting.register(answer, select.POLLIN)
    while waiting.poll(1000 * max(0.0, deadline - time.monotonic())):
        piece = answer.read(1 << 16)
        if not piece:
            return said
        said += piece
    return None
