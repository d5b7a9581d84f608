"""A disk cache of blobs that live elsewhere: bounded in bytes, least recently used out first, verified when read."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from store.backends import Health
from store.backends.disk import DiskStore
from store.errors import ExpertDamagedError, ExpertUnavailableError, StoreError
from store.tiers import Tier, TierMeter, TierStats

_log = logging.getLogger(__name__)

_OPENING_SECONDS = 10.0
"""A path that was handed out so recently is not evicted: its reader may not have opened it yet."""

Copy = TypeVar("Copy", Path, bytes)


class BlobCache:
    """Blobs in a folder, which several processes may share.

    Args:
        root: the folder, made if need be.
        limit: bytes of all that is in the folder, whoever put it there. It may be exceeded by paths that `get` has
            handed out in the last seconds, and by one blob that is larger.

    Raises:
        StoreError: the folder cannot be used.
    """

    def __init__(self, root: Path, limit: int) -> None:
        self.meter = TierMeter(Tier.CACHE)
        self._disk = DiskStore(root, self.meter)
        self._damaged: set[str] = set()
        """Whose copies were dropped because they were damaged, and have not been made anew yet."""
        self._limit = limit
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, tuple[int, float]] = OrderedDict()
        """Digest → bytes, and when its path was handed out last; the least recently used first."""
        self._folder = root / "blobs"
        self._adopt()

    @property
    def used(self) -> int:
        """Bytes."""
        with self._lock:
            return sum(size for size, _ in self._entries.values())

    def stats(self) -> TierStats:
        """What is in it, and what has been going on."""
        return self.meter.stats(used_bytes=self.used, limit_bytes=self._limit, experts=len(self._entries))

    def close(self) -> None:
        self._disk.close()

    def quarantine(self) -> Path:
        """Where `add` takes files from."""
        return self._disk.quarantine()

    def has(self, digest: str) -> bool:
        """Whether there is a copy, be it damaged."""
        return digest in self._entries

    def get(self, digest: str) -> Path | None:
        """A verified file, or None; a damaged copy is reported and dropped."""
        path = self._sound(digest, self._disk.fetch)
        if path is not None:
            with self._lock:
                if digest in self._entries:
                    self._entries[digest] = (self._entries[digest][0], time.monotonic())
        return path

    def read(self, digest: str) -> bytes | None:
        """Verified bytes, or None; a damaged copy is reported and dropped."""
        return self._sound(digest, self._disk.verified)

    def check(self, digest: str) -> Health:
        """Read a copy afresh, and leave it as it is."""
        return self._disk.verify(digest, repair=False)

    def add(self, path: Path, digest: str, seconds: float = 0.0) -> None:
        """Take over a verified file of the quarantine, and make room for it.

        Args:
            seconds: what it took to get it, for the metrics.

        Raises:
            StoreError: the disk fails, or is full.
        """
        size = path.stat().st_size
        self._disk.put_blob(path, digest)
        self._touch(digest, size)
        self.meter.loaded(seconds)
        if digest in self._damaged:
            self._damaged.discard(digest)
            self.meter.healed(digest, Tier.STORE)
        self._adopt()
        self._evict()

    def drop(self, digest: str) -> None:
        """Forget a blob."""
        with self._lock:
            self._entries.pop(digest, None)
        self._disk.delete_blob(digest)

    def _sound(self, digest: str, take: Callable[[str], Copy]) -> Copy | None:
        entry = self._entries.get(digest)
        copy: Copy | None = None
        if entry is not None:
            try:
                copy = take(digest)
            except ExpertUnavailableError as error:
                if isinstance(error, ExpertDamagedError):
                    self._damaged.add(digest)
                _log.warning("a cached copy is dropped: %s", error.message)
                self.drop(digest)
            else:
                self._touch(digest, entry[0])
        return copy

    def _touch(self, digest: str, size: int) -> None:
        with self._lock:
            _, opened = self._entries.get(digest, (0, float("-inf")))
            self._entries[digest] = (size, opened)
            self._entries.move_to_end(digest)

    def _adopt(self) -> None:
        """Take note of what other processes have put there or removed; what they put there is the first to go."""
        found: dict[str, tuple[float, int]] = {}
        for path in self._folder.glob("*/*"):
            with suppress(FileNotFoundError):
                stat = path.stat()
                found[path.name] = stat.st_mtime, stat.st_size
        with self._lock:
            for digest in self._entries.keys() - found.keys():
                del self._entries[digest]
            for digest in sorted(found.keys() - self._entries.keys(), key=lambda digest: found[digest], reverse=True):
                age = time.time() - found[digest][0]  # whoever has just put it there is about to open it
                self._entries[digest] = found[digest][1], time.monotonic() - age
                self._entries.move_to_end(digest, last=False)

    def _evict(self) -> None:
        with self._lock:
            excess = sum(size for size, _ in self._entries.values()) - self._limit
            victims = []
            for digest, (size, opened) in list(self._entries.items())[:-1]:  # not what has just come
                if excess <= 0:
                    break
                if time.monotonic() - opened > _OPENING_SECONDS:
                    victims.append(digest)
                    excess -= size
        for digest in victims:
            try:
                self.drop(digest)
            except StoreError as error:
                _log.warning("no room can be made in the cache: %s", error.message)
            else:
                self.meter.evicted()
