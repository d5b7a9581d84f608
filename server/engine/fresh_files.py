"""Expert files that have just been read: a look at one's size and the load that follows share its bytes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_LIMIT_BYTES = 1 << 28
"""Of several files, those of a mix; a single one may be larger."""
_TRUST_SECONDS = 5.0
"""How long it counts that their hash was right: bytes that rot later must be noticed, in memory as on a disk."""


class FreshFiles:
    """Files by digest, the oldest first out. Thread-safe; nothing here waits for anything but the lock."""

    def __init__(self, limit_bytes: int = _LIMIT_BYTES, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_bytes = limit_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._files: dict[str, tuple[bytes, float]] = {}

    def keep(self, digest: str, data: bytes) -> None:
        """Keep a file that has been read, and its hash checked, just now."""
        with self._lock:
            self._files.pop(digest, None)
            self._files[digest] = data, self._clock()
            while len(self._files) > 1 and sum(len(kept) for kept, _ in self._files.values()) > self._limit_bytes:
                del self._files[next(iter(self._files))]

    def get(self, digest: str) -> bytes | None:
        """A file, if it is here and fresh."""
        with self._lock:
            data, since = self._files.get(digest, (None, 0.0))
            return data if self._clock() - since <= _TRUST_SECONDS else None

    def take(self, digest: str) -> bytes | None:
        """As `get`; it is not kept any longer."""
        data = self.get(digest)
        self.drop(digest)
        return data

    def drop(self, digest: str) -> None:
        """Forget a file."""
        with self._lock:
            self._files.pop(digest, None)
