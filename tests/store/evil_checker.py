"""`store.checker`, with files that do what hostile ones wish they could: their first word says what."""

from __future__ import annotations

import ctypes
import os
import signal
import tempfile
import time
from typing import BinaryIO

from store import checker
from store.expert_file import validate_open
from store.expert_header import ExpertHeader
from store.manifest import BaseManifest


def evil(file: BinaryIO, base: BaseManifest) -> ExpertHeader:
    """Do what the file says; a sound one is checked."""
    word = file.read(5).decode(errors="replace")
    if word == "burn ":
        while True:
            pass
    elif word == "sleep":
        time.sleep(3)
    elif word == "crash":
        ctypes.string_at(0)
    elif word == "raise":
        raise KeyError(word)
    elif word == "alloc":
        bytearray(1 << 34)
    elif word == "write":
        with tempfile.TemporaryFile() as scratch:
            scratch.write(b"x")
    elif word == "death":
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    file.seek(0)
    return validate_open(file, base)


if __name__ == "__main__":
    checker.validate_open = evil
    checker.main()
