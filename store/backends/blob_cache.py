"""A disk cache of blobs that live elsewhere: bounded in bytes, least recently used out first, verified when read."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from store.backends import Health
from store.backends.disk import DiskStore
from store.backends.filesystem import reported
from store.errors import ExpertDamagedError, ExpertUnavailableError, StoreError
from store.tiers import Tier, TierMeter, TierStats

_log = logging.getLogger(__name__)

_OPENING_SECONDS = 10.0
"""A path that was handed out so recently is not evicted: its reader may not have opened it yet."""
_TOUCHED_SECONDS = 5.0
"""How long a touched file is not touched again: it has seconds left then before another process may evict it. No
shorter than a hash counts (`store.backends.disk`), which a touched file loses."""

Copy = TypeVar("Copy", Path, bytes)


@dataclass
class _Entry:
    """A blob as it was seen last.

    Attributes:
        size: bytes.
        changed: the file's time of change: `get` sets it, so that other processes see what has been handed out.
        opened: when its path was handed out last, by whatever process, on this one's monotonic clock.
        touched: when this process set the time of change last.
    """

    size: int
    changed: float
    opened: float = float("-inf")
    touched: float = float("-inf")


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
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        """By digest; the least recently used first."""
        self._folder = root / "blobs"
        self._adopt()

    @property
    def used(self) -> int:
        """Bytes."""
        with self._lock:
            return self._used()

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
        """A verified file, or None; a damaged copy is reported and dropped.

        No process that shares the folder evicts it in the next seconds.
        """
        self._hand_out(digest)  # before it is hashed: a hash counts for the file as it was then
        path = self._sound(digest, self._disk.fetch)
        self._hand_out(digest)
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
        with reported("cache the file"):
            stat = path.stat()
        self._disk.put_blob(path, digest)
        with self._lock:
            known = self._entries.get(digest)
            opened = float("-inf") if known is None else known.opened
            self._entries[digest] = _Entry(stat.st_size, stat.st_mtime, opened)
            self._entries.move_to_end(digest)
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
        copy: Copy | None = None
        if digest in self._entries:
            try:
                copy = take(digest)
            except ExpertUnavailableError as error:
                if isinstance(error, ExpertDamagedError):
                    self._damaged.add(digest)
                _log.warning("a cached copy is dropped: %s", error.message)
                self.drop(digest)
            else:
                with self._lock:
                    if digest in self._entries:
                        self._entries.move_to_end(digest)
        return copy

    def _hand_out(self, digest: str) -> None:
        """Note that a path is handed out, for this process and, by the file's time of change, for the others."""
        with self._lock:
            entry = self._entries.get(digest)
            if entry is None:
                return
            entry.opened = now = time.monotonic()
            if now - entry.touched < _TOUCHED_SECONDS:
                return
            entry.touched = now
        with suppress(OSError):  # it has just been evicted, or is another user's
            os.utime(self._path(digest))

    def _adopt(self) -> None:
        """Take note of what other processes have put there or removed; what they put there is the first to go."""
        found: dict[str, tuple[float, int]] = {}
        for path in self._folder.glob("*/*"):
            with suppress(FileNotFoundError):
                stat = path.stat()
                found[path.name] = stat.st_mtime, stat.st_size
        with self._lock:
            for digest in self._entries.keys() - found.keys():
                if not self._path(digest).exists():  # else it has come since the folder was listed
                    del self._entries[digest]
            for digest in sorted(found, key=lambda digest: found[digest], reverse=True):
                changed, size = found[digest]
                # Whoever has just put it there, or touched it, is about to open it.
                opened = time.monotonic() - max(0.0, time.time() - changed)
                entry = self._entries.get(digest)
                if entry is None:
                    self._entries[digest] = _Entry(size, changed, opened)
                    self._entries.move_to_end(digest, last=False)
                elif entry.changed != changed:
                    entry.changed, entry.opened = changed, max(entry.opened, opened)

    def _evict(self) -> None:
        with self._lock:
            excess = self._used() - self._limit
            victims = []
            for digest, entry in list(self._entries.items())[:-1]:  # not what has just come
                if excess <= 0:
                    break
                if time.monotonic() - entry.opened > _OPENING_SECONDS:
                    victims.append(digest)
                    excess -= entry.size
        for digest in victims:
            try:
                self.drop(digest)
            except StoreError as error:
                _log.warning("no room can be made in the cache: %s", error.message)
            else:
                self.meter.evicted()

    def _used(self) -> int:
        return sum(entry.size for entry in self._entries.values())

    def _path(self, digest: str) -> Path:
        return self._folder / digest[:2] / digest
