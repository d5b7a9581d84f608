"""A file on its way in: bounded and hashed while it is written, gone again unless somebody takes it over."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from store.errors import StorageFullError, StoreError, TooLargeError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""What the system says where there is no room for more bytes."""


@dataclass(frozen=True)
class Received:
    """A file that has arrived whole, in quarantine.

    Attributes:
        path: where it lies.
        digest: hex sha256 of its bytes.
        bytes: its size.
    """

    path: Path
    digest: str
    bytes: int

    def discard(self) -> None:
        """Delete the file, unless it was taken over."""
        self.path.unlink(missing_ok=True)


class Intake:
    """Writes one file into a folder of its owner's; as a context manager, deletes it unless `finish` was reached.

    Args:
        folder: where to; bytes that are not trusted yet belong into quarantine.
        max_bytes: how long the file may get.

    Raises:
        StoreError: it cannot be created; StorageFullError where there is no room.
    """

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._hash = hashlib.sha256()
        self._size = 0
        with receiving():
            descriptor, name = tempfile.mkstemp(dir=folder, prefix="upload-")
        self._file = os.fdopen(descriptor, "wb", buffering=0)
        self._path = Path(name)
        self._finished = False
        # Whoever is cancelled leaves while a thread still writes: its descriptor must not be another file's by then.
        self._door = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._door, suppress(OSError):
            self._file.close()
        if not self._finished:
            self._path.unlink(missing_ok=True)

    def write(self, data: bytes | bytearray) -> None:
        """Append some bytes.

        Raises:
            TooLargeError: the file would exceed its limit; nothing of `data` was written.
            StorageFullError, StoreError: it cannot be written.
        """
        if self._size + len(data) > self._max_bytes:
            raise TooLargeError(f"the file exceeds the limit of {self._max_bytes} bytes", param="file")
        with self._door:
            if self._file.closed:
                raise StoreError("the upload has ended")
            with receiving():
                write_all(self._file.fileno(), data)
            self._hash.update(data)
            self._size += len(data)

    def finish(self) -> Received:
        """The whole file; from here on it is the caller's to delete."""
        with receiving():
            self._file.close()
        self._finished = True
        return Received(self._path, self._hash.hexdigest(), self._size)


def write_all(descriptor: int, data: bytes | bytearray) -> None:
    """Write all of `data`; a write to a disk that fills up may be a short one.

    Raises:
        OSError: it cannot be written; part of it may have been.
    """
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


@contextmanager
def receiving() -> Iterator[None]:
    """Turn the system's errors into ours; the message names no paths, since clients see it."""
    try:
        yield
    except OSError as error:
        kind = StorageFullError if error.errno in FULL else StoreError
        raise kind(f"cannot receive the file: {error.strerror}") from error
