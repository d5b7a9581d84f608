"""Decoded experts in host memory: bounded in bytes, least recently used first out, never one that is being read."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from server.engine.parcel import Parcel
from server.engine.pinning import pin, unpin
from store.tiers import Tier, TierMeter, TierStats


@dataclass(eq=False)
class _Entry:
    """A parcel, how many read it (who locks its pages is one of them), and whether its pages are locked."""

    parcel: Parcel
    readers: int = 0
    locked: bool = False


class HostTier:
    """Parcels by digest. Thread-safe; nothing here waits for anything but the lock, which is held for microseconds.

    Locking the pages of a large expert takes a good part of a second, and so does unlocking them: a thread of its own
    does both, one after the other, and until it has come to an expert its copies are slower ones.

    Args:
        limit_bytes: most bytes in it, those being read included; 0 keeps nothing.
        page_locked: whether the device is a GPU, which copies fast from page-locked memory only.
        on_thread: run on that thread before all else, which begins on the first GPU.
    """

    def __init__(
        self, limit_bytes: int, *, page_locked: bool = False, on_thread: Callable[[], None] | None = None
    ) -> None:
        self.limit_bytes = limit_bytes
        self.meter = TierMeter(Tier.HOST)
        self._locker = ThreadPoolExecutor(1, "page-locker", initializer=on_thread) if page_locked else None
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._used = 0

    @property
    def used_bytes(self) -> int:
        """Bytes in it, and of what has been dropped while somebody still reads it."""
        return self._used

    def stats(self) -> TierStats:
        """What it holds and has done."""
        with self._lock:
            used, count = self._used, len(self._entries)
        return self.meter.stats(used_bytes=used, limit_bytes=self.limit_bytes, experts=count)

    def digests(self) -> frozenset[str]:
        """Whose parcels are here."""
        with self._lock:
            return frozenset(self._entries)

    def bytes_of(self, digest: str) -> int | None:
        """How many bytes an expert has; None if it is not here. Not a look-up: nobody asks for the expert itself."""
        with self._lock:
            entry = self._entries.get(digest)
        return None if entry is None else entry.parcel.nbytes

    def is_locked(self, digest: str) -> bool:
        """Whether an expert is here, in page-locked memory. A tensor's `is_pinned` asks where its storage begins, which
        in large pages is before what is locked."""
        with self._lock:
            entry = self._entries.get(digest)
        return entry is not None and entry.locked

    @contextmanager
    def reading(self, digest: str) -> Iterator[Parcel | None]:
        """Look an expert up and hold it, in one step; None if it is not here."""
        with self._lock:
            entry = self._entries.get(digest)
            if entry is not None:
                entry.readers += 1
                self._entries.move_to_end(digest)
        if self.limit_bytes:
            self.meter.looked_up(found=entry is not None)
        try:
            yield None if entry is None else entry.parcel
        finally:
            if entry is not None:
                self._end_reading(entry)

    def take(self, digest: str) -> Parcel | None:
        """Look an expert up and forget it, in one step: whoever takes it has its bytes from now on."""
        with self._lock:
            entry = self._entries.pop(digest, None)
            self._used -= entry.parcel.nbytes if entry is not None and entry.readers == 0 else 0
        if self.limit_bytes:
            self.meter.looked_up(found=entry is not None)
        return None if entry is None else entry.parcel

    def room(self, spared: Collection[str]) -> int:
        """Bytes that `put` could find now without these experts."""
        with self._lock:
            idle = [e.parcel.nbytes for d, e in self._entries.items() if e.readers == 0 and d not in spared]
            return self.limit_bytes - self._used + sum(idle)

    def put(self, parcel: Parcel, seconds: float, spared: Collection[str] = ()) -> bool:
        """Keep a parcel, in place of what was used least recently; False if there is no room for it.

        Args:
            seconds: what it took to make, for the metrics.
            spared: experts that must not go for it.
        """
        with self._lock:
            if parcel.digest in self._entries:
                self._entries.move_to_end(parcel.digest)
                return True
            victims = self._victims(parcel.nbytes, spared)
            if victims is None:
                return False
            gone = [self._entries.pop(victim) for victim in victims]
            self._used += parcel.nbytes - sum(entry.parcel.nbytes for entry in gone)
            entry = self._entries[parcel.digest] = _Entry(parcel, readers=0 if self._locker is None else 1)
        for other in gone:
            self._let_go(other)
            self.meter.evicted()
        if self._locker is not None:
            self._locker.submit(self._lock_pages, entry)
        self.meter.loaded(seconds)
        return True

    def touch(self, digest: str) -> None:
        """Take note that an expert was in use until now, on the device."""
        with self._lock:
            if digest in self._entries:
                self._entries.move_to_end(digest)

    def drop(self, digest: str) -> None:
        """Forget an expert: nobody finds it from now on, and its memory goes with its last reader."""
        with self._lock:
            entry = self._entries.pop(digest, None)
            idle = entry is not None and entry.readers == 0
            self._used -= entry.parcel.nbytes if entry is not None and idle else 0
        if entry is not None and idle:
            self._let_go(entry)

    def settle(self) -> None:
        """Wait until the pages of all that has been put here are locked, and of what has left unlocked."""
        if self._locker is not None:
            self._locker.submit(lambda: None).result()

    def close(self) -> None:
        """Forget everything. Nobody may read any more."""
        for digest in list(self._entries):
            self.drop(digest)
        self.settle()  # what was being locked has asked to be unlocked
        if self._locker is not None:
            self._locker.shutdown()

    def _victims(self, nbytes: int, spared: Collection[str]) -> list[str] | None:
        """Who must go for so many bytes, the least recently used first; None if that would not be enough."""
        victims = []
        missing = self._used + nbytes - self.limit_bytes
        for digest, entry in self._entries.items():
            if missing <= 0:
                break
            if entry.readers == 0 and digest not in spared:
                victims.append(digest)
                missing -= entry.parcel.nbytes
        return victims if missing <= 0 else None

    def _end_reading(self, entry: _Entry) -> None:
        with self._lock:
            entry.readers -= 1
            gone = entry.readers == 0 and self._entries.get(entry.parcel.digest) is not entry
            self._used -= entry.parcel.nbytes if gone else 0
        if gone:
            self._let_go(entry)

    def _let_go(self, entry: _Entry) -> None:
        if entry.locked and self._locker is not None:
            self._locker.submit(unpin, entry.parcel.buffer)

    def _lock_pages(self, entry: _Entry) -> None:
        try:
            if self._entries.get(entry.parcel.digest) is entry:  # not gone already
                entry.locked = pin(entry.parcel.buffer)
        finally:
            self._end_reading(entry)
