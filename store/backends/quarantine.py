"""Bytes that are not trusted yet: a folder per process, emptied after the process's death."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from pathlib import Path


class Quarantine:
    """A folder of this process's own. Made and cleared while the store is held.

    A lock on its file `.lock` tells that the process lives; the kernel drops it when the process dies, whatever way.

    Args:
        root: the folder of all processes' folders, which exists.
    """

    def __init__(self, root: Path) -> None:
        _clear(root)
        self.path = Path(tempfile.mkdtemp(dir=root))
        self._lock = (self.path / ".lock").open("ab")
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _clear(root: Path) -> None:
    """Remove what dead processes left. A folder's lock can be taken only if its owner is gone."""
    for folder in root.iterdir():
        try:
            with (folder / ".lock").open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        except FileNotFoundError:
            pass  # killed between making the folder and its lock: both happen under the store's lock
        shutil.rmtree(folder, ignore_errors=True)
