"""A count of changes that processes sharing a folder see: odd while a change is under way."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class EditionFile:
    """The count, in a file that is created if need be. Whoever changes it holds the folder's lock.

    Raises:
        OSError: the file cannot be created or opened.
    """

    def __init__(self, path: Path) -> None:
        path.touch()
        self._file = path.open("r+b", buffering=0)

    def close(self) -> None:
        self._file.close()

    def value(self) -> int:
        """The count; while a change is under way, a number that was never given before."""
        count = self._count()
        # Half a change, or one whose maker was killed: nobody may take it for the last word.
        return count if count % 2 == 0 else -time.monotonic_ns()

    def settle(self) -> None:
        """Count what a killed process may have left half done."""
        self._bump(odd=False)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Around the one step that changes something."""
        self._bump(odd=True)
        try:
            yield
        finally:
            self._bump(odd=False)

    def _bump(self, *, odd: bool) -> None:
        count = self._count() + 1
        os.pwrite(self._file.fileno(), (count + (count % 2 != odd)).to_bytes(8, "little"), 0)

    def _count(self) -> int:
        return int.from_bytes(os.pread(self._file.fileno(), 8, 0), "little")
