"""Uploads that may be interrupted: declared first, received in as many pieces as it takes, found again after a crash.

    uploads/ID.json   what was declared, and the digest once every byte is there; an upload is there if this is
    uploads/ID.part   the bytes so far: its length is the offset
    uploads/lock      held while uploads are made and removed

A piece is flushed to disk before it is acknowledged. Nothing here is trusted: whoever takes a file checks it.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from store.errors import (
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    QueueFullError,
    StorageFullError,
    TooLargeError,
)
from store.expert_info import DIGEST_PATTERN
from store.intake import Received, receiving
from store.strict_json import FieldError
from store.upload import FILENAME_PATTERN, Appending, Upload, parse_upload

_ID_PATTERN = re.compile(r"upload_[0-9a-f]{32}")
_RETRY_SECONDS = 60


class Uploads:
    """The uploads in a folder. Thread-safe; several processes may share the folder, which is made when it is needed.

    To declare a file costs nothing, and no tenant must shut out the others by it: each may have half of what these
    leave, of `max_bytes` and of `max_open`, so that there is always something left. One upload is not too many where
    there is room at all. The operator's are bound by `max_bytes` and `max_open` alone.

    Args:
        folder: where they are kept.
        max_bytes: what all of them may declare together.
        max_open: how many there may be.
        seconds: how long one is kept after its last byte.
        beside: bytes that count as well, by owner, such as those of files that were taken and are still worked on.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_bytes: int,
        max_open: int,
        seconds: float,
        beside: Callable[[], Mapping[str | None, int]] = dict,
    ) -> None:
        self.max_bytes = max_bytes
        self.seconds = seconds
        self._folder = folder
        self._max_open = max_open
        self._beside = beside
        self._hashes: dict[str, tuple[int, hashlib._Hash]] = {}
        """Of files whose bytes all came while this process ran: offset, and what was hashed up to there."""

    def create(
        self, filename: str, size: int, sha256: str | None = None, owner: str | None = None
    ) -> tuple[Upload, bool]:
        """Declare a file; an open upload of the same owner, name, size and digest is gone on with.

        Returns:
            The upload, and whether it is new.

        Raises:
            InvalidRequestError: the name is more than a file's name, or size or digest are none.
            TooLargeError: the settings leave no room for so many bytes, or not to this owner.
            QueueFullError: there are too many uploads, or of this owner.
            StorageFullError: the disk has no room for it.
            StoreError: the folder cannot be written.
        """
        if not FILENAME_PATTERN.fullmatch(filename):
            raise InvalidRequestError(
                "a file name has 1 to 200 letters, digits, spaces and '.', '_', '-', and no folder", param="filename"
            )
        if size < 1:
            raise InvalidRequestError("a file has at least one byte", param="bytes")
        if sha256 is not None and not DIGEST_PATTERN.fullmatch(sha256):
            raise InvalidRequestError("sha256 has 64 lower-case hexadecimal digits", param="sha256")
        with self._changing():
            self._expire()
            known = self.list()
            same = (
                one
                for one in known
                if (one.owner, one.filename, one.bytes, one.sha256) == (owner, filename, size, sha256)
            )
            if sha256 is not None and (found := next(same, None)) is not None:
                return found, False
            self._check_room(known, size, owner)
            now = int(time.time())
            upload = Upload(f"upload_{secrets.token_hex(16)}", filename, size, sha256, now, touched=now, owner=owner)
            self._part(upload.id).touch(0o600)
            self._declare(upload)
            return upload, True

    def list(self) -> Sequence[Upload]:
        """All uploads, the oldest first."""
        found = []
        for path in self._folder.glob("upload_*.json"):
            with suppress(NotFoundError):
                found.append(self.get(path.stem))
        return sorted(found, key=lambda upload: (upload.created, upload.id))

    def get(self, upload_id: str) -> Upload:
        """The upload of that id.

        Raises:
            NotFoundError: there is none (any more).
        """
        if _ID_PATTERN.fullmatch(upload_id):
            with suppress(FileNotFoundError, FieldError):
                file = self._part(upload_id).stat()
                return parse_upload(upload_id, (self._folder / f"{upload_id}.json").read_bytes(), file)
        raise NotFoundError(f"there is no upload {upload_id[:64]!r}", param="upload", code="upload_not_found")

    def begin(self, upload_id: str, offset: int) -> Appending:
        """Go on with an upload at its offset. Whoever has it says `end`.

        Raises:
            NotFoundError: there is no such upload (any more).
            ConflictError: it has another offset, or another piece of it is being received.
        """
        upload = self.get(upload_id)
        appending = Appending(upload, self._part(upload_id), offset, None)
        covered, running = self._hashes.pop(upload_id, (0, hashlib.sha256()))
        appending.running = running if covered == offset else None
        return appending

    def end(self, appending: Appending) -> Upload:
        """Make a piece durable. With the last one, the file is what was declared, or it is gone.

        Raises:
            NotFoundError: the upload was deleted meanwhile.
            InvalidRequestError: the bytes are all there, and are not what was declared; the upload is gone.
            StoreError: the piece may not be durable.
        """
        appending.close()
        upload = appending.upload
        if appending.running is not None:
            self._hashes[upload.id] = appending.offset, appending.running
        if appending.offset == upload.bytes:
            self._complete(upload)
        return self.get(upload.id)

    def take(self, upload_id: str, target: Path) -> Received:
        """A whole file under another name too, which the caller discards.

        Raises:
            NotFoundError: there is no such upload (any more).
            ConflictError: it is not whole yet.
            InvalidRequestError: its bytes are not what was declared; the upload is gone.
            StoreError: it cannot be put there.
        """
        upload = self.get(upload_id)
        if upload.offset != upload.bytes:
            raise ConflictError(
                f"the upload has {upload.offset} of {upload.bytes} bytes: send the rest first",
                param="upload",
                code="upload_incomplete",
            )
        received = Received(target, upload.digest or self._complete(upload), upload.bytes)
        with receiving():
            try:
                os.link(self._part(upload_id), target)
            except OSError:  # another file system, or one without links
                try:
                    shutil.copyfile(self._part(upload_id), target)
                except BaseException:
                    received.discard()
                    raise
        return received

    def delete(self, upload_id: str) -> None:
        """Forget an upload and its bytes.

        Raises:
            NotFoundError: there is no such upload (any more).
        """
        self.get(upload_id)
        with self._changing():
            self._remove(upload_id)

    def expire(self) -> None:
        """Forget uploads that nobody goes on with, and what a killed process left of others."""
        if self._folder.is_dir():
            with self._changing():
                self._expire()

    def _expire(self) -> None:
        oldest = time.time() - self.seconds
        kept = set()
        for upload in self.list():
            if upload.touched < oldest:
                self._remove(upload.id)
            else:
                kept.add(upload.id)
        for path in [*self._folder.glob("upload_*"), *self._folder.glob(".upload_*")]:
            if path.name.lstrip(".").split(".")[0] not in kept:
                path.unlink(missing_ok=True)

    def _check_room(self, known: Sequence[Upload], size: int, owner: str | None) -> None:
        opened = Counter(upload.owner for upload in known)
        declared = Counter(self._beside())
        for upload in known:
            declared[upload.owner] += upload.bytes
        if len(known) >= self._max_open:
            raise QueueFullError(
                f"{len(known)} uploads are open, and no more may be: use or delete one", retry_after=_RETRY_SECONDS
            )
        if declared.total() + size > self.max_bytes:
            raise TooLargeError(
                f"open uploads may have {self.max_bytes} bytes together, and {declared.total()} are taken",
                param="bytes",
            )
        if opened[owner] >= max(1, _share(self._max_open, opened, owner)):
            message = f"{owner} has {opened[owner]} open uploads, and the rest is for others: use or delete one"
            raise QueueFullError(message, retry_after=_RETRY_SECONDS)
        if declared[owner] + size > (share := _share(self.max_bytes, declared, owner)):
            raise TooLargeError(
                f"open uploads and jobs of {owner} may have {share} bytes now, and {declared[owner]} are taken: the "
                "rest is for others",
                param="bytes",
            )
        missing = size + sum(upload.bytes - upload.offset for upload in known)
        if missing > shutil.disk_usage(self._folder).free:
            raise StorageFullError(f"the disk has no room for {size} bytes", param="bytes")

    def _complete(self, upload: Upload) -> str:
        """Note the digest of a file that is whole."""
        covered, running = self._hashes.pop(upload.id, (0, hashlib.sha256()))
        with receiving():
            if covered != upload.bytes:  # some of it came before this process started
                with self._part(upload.id).open("rb") as file:
                    running = hashlib.file_digest(file, "sha256")
        digest = running.hexdigest()
        with self._changing():
            self.get(upload.id)  # it may have been deleted meanwhile
            if upload.sha256 not in (None, digest):
                self._remove(upload.id)
                raise InvalidRequestError(
                    f"the bytes have the sha256 {digest}, not the one that was declared: upload the file again",
                    param="sha256",
                    code="checksum_mismatch",
                )
            self._declare(dataclasses.replace(upload, digest=digest))
        return digest

    def _declare(self, upload: Upload) -> None:
        temporary = self._folder / f".{upload.id}.tmp"
        with temporary.open("wb") as file:
            file.write(upload.to_json().encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._folder / f"{upload.id}.json")
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _remove(self, upload_id: str) -> None:
        self._hashes.pop(upload_id, None)
        for suffix in ("json", "part"):  # in this order: without the first it is gone
            (self._folder / f"{upload_id}.{suffix}").unlink(missing_ok=True)

    def _part(self, upload_id: str) -> Path:
        return self._folder / f"{upload_id}.part"

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with receiving():
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / "lock").open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield


def _share(most: int, taken: Mapping[str | None, int], owner: str | None) -> int:
    """What an owner may have in all: the operator everything, a tenant half of what the others leave."""
    left = most - sum(amount for other, amount in taken.items() if other != owner)
    return left if owner is None else left // 2
