"""The checker's process: `python -m store.checker SOCKET`, started by `store.validation`. NumPy only; no torch.

Reads base and limits from its input. Every message on the socket brings two descriptors: an expert file, and where the
verdict goes. The check runs in a fork that can be lost; a second process watches it and tells how it ended.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
import traceback
from typing import BinaryIO

from store.errors import ExpertFileError
from store.expert_file import validate_open
from store.expert_header import header_to_json
from store.manifest import BaseManifest
from store.validation import Limits


def serve(door: socket.socket, base: BaseManifest, limits: Limits) -> None:
    """Check files until the server has gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the watching processes
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C means the server, which then closes the door
    while True:
        word, descriptors, _, _ = socket.recv_fds(door, 1, 2)
        if not word:
            return
        file, answer = descriptors
        if os.fork() == 0:
            door.close()
            try:
                watch(file, answer, base, limits)
            finally:
                os._exit(0)
        os.close(file)
        os.close(answer)


def watch(file: int, answer: int, base: BaseManifest, limits: Limits) -> None:
    """Check a file in a fork, and say so if that dies."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child == 0:
        try:
            confine(limits)
            with os.fdopen(file, "rb") as opened:
                said = verdict(opened, base)
            _say(answer, said)
            os._exit(0)
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if code := os.waitstatus_to_exitcode(status):
        _say(answer, {"died": code})


def confine(limits: Limits) -> None:
    """Bound what this process can do. The kernel ends it, whatever it is busy with."""
    signal.setitimer(signal.ITIMER_REAL, limits.wall_seconds)
    bounds = {
        resource.RLIMIT_CPU: (limits.cpu_seconds, limits.cpu_seconds + 1),
        resource.RLIMIT_AS: (limits.memory, limits.memory),
        resource.RLIMIT_FSIZE: (0, 0),
        resource.RLIMIT_CORE: (0, 0),
    }
    for what, bound in bounds.items():
        resource.setrlimit(what, bound)


def verdict(file: BinaryIO, base: BaseManifest) -> dict[str, object]:
    """The header of a sound file, or what is wrong with it; neither where memory ran out."""
    try:
        return {"header": header_to_json(validate_open(file, base))}
    except ExpertFileError as error:
        return {"error": {"message": error.message, "param": error.param, "code": error.code}}
    except MemoryError:
        return {}


def _say(answer: int, said: dict[str, object]) -> None:
    with os.fdopen(os.dup(answer), "wb") as file:
        file.write(json.dumps(said).encode() + b"\n")


def main() -> None:
    given = json.load(sys.stdin)
    tensors = {name: tuple(shape) for name, shape in given["base"]["tensors"].items()}
    with socket.socket(fileno=int(sys.argv[1])) as door:
        serve(door, BaseManifest(given["base"]["fingerprint"], tensors), Limits(**given["limits"]))


if __name__ == "__main__":
    main()
