"""One upload that may be interrupted: what was declared, and a piece of it on its way to disk."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import threading
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path

from store.errors import ConflictError, StoreError, TooLargeError
from store.expert_info import DIGEST_PATTERN, NAME_PATTERN
from store.intake import receiving, write_all
from store.strict_json import Fields, parse_json

FILENAME_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._ -]{0,199}")
"""A file's own name: no folder, nothing hidden."""
_KEPT_ELSEWHERE = ("id", "offset", "touched")


@dataclass(frozen=True)
class Upload:
    """A file that is being uploaded.

    Attributes:
        id: what it is called until it is used.
        filename: the file's own name.
        bytes: its size.
        sha256: what its bytes are to be, in hex, where the client has said so.
        created: when it was declared, seconds since 1970.
        digest: hex sha256 of its bytes, once all are there.
        offset: bytes that are there.
        touched: when bytes last came, seconds since 1970.
        owner: the tenant that sends it; None is the operator of the server.
    """

    id: str
    filename: str
    bytes: int
    sha256: str | None
    created: int
    digest: str | None = None
    offset: int = 0
    touched: int = 0
    owner: str | None = None

    def to_json(self) -> str:
        """What is kept beside the bytes; the rest their file tells."""
        return json.dumps({key: value for key, value in asdict(self).items() if key not in _KEPT_ELSEWHERE})


def parse_upload(upload_id: str, data: bytes, file: os.stat_result) -> Upload:
    """What was kept, and the file with the bytes so far, as a value.

    Raises:
        FieldError: it is damaged.
    """
    fields = Fields(parse_json(data, "upload"), "upload")

    def digest(key: str) -> str | None:
        return fields.text(key, max_bytes=64, pattern=DIGEST_PATTERN) if fields.has(key) else None

    return Upload(
        id=upload_id,
        filename=fields.text("filename", max_bytes=200, pattern=FILENAME_PATTERN),
        bytes=fields.integer("bytes", low=1, high=2**53),
        sha256=digest("sha256"),
        created=fields.integer("created", low=0, high=2**53),
        digest=digest("digest"),
        offset=file.st_size,
        touched=int(file.st_mtime),
        owner=fields.text("owner", max_bytes=64, pattern=NAME_PATTERN) if fields.has("owner") else None,
    )


class Appending:
    """One piece of an upload on its way to disk. Locks the file: there is one at a time, in all processes.

    Args:
        path: the file with the bytes so far.
        offset: where the piece begins.
        running: what was hashed up to there; None where that is not known.

    Raises:
        ConflictError: the file ends elsewhere, or another piece is being received.
        StoreError: it cannot be opened.
    """

    def __init__(self, upload: Upload, path: Path, offset: int, running: hashlib._Hash | None) -> None:
        self.upload = upload
        self.offset = offset
        self.running = running
        self._began = offset
        # Whoever is cancelled leaves while a thread still writes.
        self._door = threading.Lock()
        with receiving():
            self._file = FileIO(path, "ab")
        try:
            self._check(offset)
        except BaseException:
            self._file.close()
            raise

    def _check(self, offset: int) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConflictError("another piece of this upload is being received", code="upload_in_use") from None
        there = os.fstat(self._file.fileno()).st_size
        if there != offset:
            raise ConflictError(
                f"the upload has {there} bytes, not {offset}: go on from there",
                param="Upload-Offset",
                code="upload_offset_mismatch",
            )

    def write(self, data: bytes | bytearray) -> None:
        """Append some bytes.

        Raises:
            TooLargeError: there are more than were declared; nothing of `data` was written.
            StorageFullError, StoreError: they cannot be written.
        """
        with self._door:
            if self._file.closed:
                raise StoreError("the upload has been left")
            if self.offset + len(data) > self.upload.bytes:
                raise TooLargeError(f"{self.upload.bytes} bytes were declared, and more came", param="bytes")
            running, self.running = self.running, None  # unknown until all of `data` is there
            with receiving():
                write_all(self._file.fileno(), data)
            self.offset += len(data)
            if running is not None:
                running.update(data)
            self.running = running

    def take_back(self) -> None:
        """Forget this piece: a full disk is to have room again."""
        with self._door:
            self._file.truncate(self._began)
            self.running = None
            self.offset = self._began

    def close(self) -> None:
        """Make what was written durable, and let others go on.

        Raises:
            StoreError: it may not be.
        """
        with self._door, receiving():
            try:
                os.fsync(self._file.fileno())
            finally:
                self._file.close()
