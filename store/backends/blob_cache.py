"""A disk cache of blobs that live elsewhere: bounded in bytes, least recently used out first, verified when read."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from pathlib import Path

from store.backends.disk import DiskStore
from store.errors import ExpertUnavailableError, StoreError

_log = logging.getLogger(__name__)

_OPENING_SECONDS = 10.0
"""What was handed out so recently is not evicted: its reader may not have opened it yet."""


class BlobCache:
    """Blobs in a folder, which several processes may share.

    The limit may be exceeded by what was handed out in the last seconds, and by one blob that is larger.

    Args:
        root: the folder, made if need be.
        limit: bytes.

    Raises:
        StoreError: the folder cannot be used.
    """

    def __init__(self, root: Path, limit: int) -> None:
        self._disk = DiskStore(root)
        self._limit = limit
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, tuple[int, float]] = OrderedDict()
        """Digest → bytes, and when it was handed out last; the least recently used first."""
        found = []
        for path in (root / "blobs").glob("*/*"):
            stat = path.stat()
            found.append((stat.st_mtime, path.name, stat.st_size))
        for _, digest, size in sorted(found):
            self._entries[digest] = (size, float("-inf"))

    @property
    def used(self) -> int:
        """Bytes."""
        with self._lock:
            return sum(size for size, _ in self._entries.values())

    def close(self) -> None:
        self._disk.close()

    def quarantine(self) -> Path:
        """Where `add` takes files from."""
        return self._disk.quarantine()

    def get(self, digest: str) -> Path | None:
        """A verified file, or None; a damaged copy is reported and dropped."""
        if digest not in self._entries:
            return None
        try:
            path = self._disk.fetch(digest)
        except ExpertUnavailableError as error:
            _log.warning("a cached copy is dropped: %s", error.message)
            self.drop(digest)
            return None
        self._touch(digest, path)
        return path

    def add(self, path: Path, digest: str) -> Path:
        """Take over a verified file of the quarantine, and make room for it. Returns where it is now.

        Raises:
            StoreError: the disk fails, or is full.
        """
        self._disk.put_blob(path, digest)
        kept = self._disk.fetch(digest)
        self._touch(digest, kept)
        self._evict()
        return kept

    def drop(self, digest: str) -> None:
        """Forget a blob."""
        with self._lock:
            self._entries.pop(digest, None)
        self._disk.delete_blob(digest)

    def _touch(self, digest: str, path: Path) -> None:
        with self._lock:
            self._entries[digest] = (path.stat().st_size, time.monotonic())
            self._entries.move_to_end(digest)

    def _evict(self) -> None:
        with self._lock:
            excess = sum(size for size, _ in self._entries.values()) - self._limit
            victims = []
            for digest, (size, when) in self._entries.items():
                if excess <= 0:
                    break
                if time.monotonic() - when > _OPENING_SECONDS:
                    victims.append(digest)
                    excess -= size
        for digest in victims:
            try:
                self.drop(digest)
            except StoreError as error:
                _log.warning("no room can be made in the cache: %s", error.message)
