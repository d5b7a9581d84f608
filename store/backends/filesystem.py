"""The file system's failures in our words, and folders that are flushed."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from store.errors import ExpertUnavailableError, StorageFullError, StoreError

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
}
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def reported(action: str) -> Iterator[None]:
    """Turn the system's errors into ours; the message names no paths, since clients see it."""
    try:
        yield
    except OSError as error:
        kind = StorageFullError if error.errno in _FULL else StoreError
        raise kind(f"cannot {action}: {_reason(error)}") from error


@contextmanager
def reading(digest: str) -> Iterator[None]:
    """Turn the system's errors while a blob is read into ours."""
    what = f"the stored bytes of {digest[:12]}…"
    try:
        yield
    except FileNotFoundError:
        raise ExpertUnavailableError(f"{what} are gone; upload the expert again") from None
    except OSError as error:
        raise ExpertUnavailableError(f"{what} cannot be read: {_reason(error)}") from None


def sync_folder(folder: Path) -> None:
    """Flush a folder: a rename is durable only once the folder is."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: OSError) -> str:
    return _REASONS.get(error.errno or 0) or error.strerror or "input/output error"
