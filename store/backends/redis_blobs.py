"""Blobs in Redis: in chunks, complete after the last one, verified on the way out, healed by whoever has a copy."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import redis

from store.backends.filesystem import reported
from store.backends.redis_link import BLOBS, DAMAGED, IF_HELD, RedisLink, chunk_key
from store.errors import ExpertDamagedError, ExpertUnavailableError
from store.tiers import TierMeter

_CHUNK = 8 << 20
"""Bytes of a chunk: Redis serves one command at a time, and others must get a word in."""
_COMPLETE, _PARTIAL = b"complete", b"partial"

_BEGIN = f"{IF_HELD} return redis.call('HSETNX', KEYS[2], ARGV[2], ARGV[3])"
_CHECK = f"{IF_HELD} return 1"
_FINISH = f"""{IF_HELD}
redis.call('HSET', KEYS[2], ARGV[2], ARGV[3])
return redis.call('SREM', KEYS[3], ARGV[2])
"""
_FORGET = f"""{IF_HELD}
redis.call('HDEL', KEYS[2], ARGV[2])
redis.call('SREM', KEYS[3], ARGV[2])
for i = 0, tonumber(ARGV[3]) - 1 do redis.call('UNLINK', ARGV[4] .. i) end
return 1
"""


class RedisBlobs:
    """The blobs of one Redis. Thread-safe. Callers turn Redis's errors into ours (`RedisLink.reported`).

    Args:
        quarantine: folder that `receive` writes to.
    """

    def __init__(self, link: RedisLink, quarantine: Path, meter: TierMeter) -> None:
        self._link = link
        self._redis = link.client
        self._quarantine = quarantine
        self._meter = meter
        script = self._redis.register_script
        self._begin, self._check, self._finish = script(_BEGIN), script(_CHECK), script(_FINISH)
        self._forget = script(_FORGET)

    def send(self, path: Path, digest: str) -> None:
        """Write a file's chunks, over damaged ones if need be. The lease is held.

        A writer that slept through its lease does not finish: who holds it now may have collected the chunks that it
        wrote before, and the rest would be called complete without them.

        Raises:
            StoreError: the file cannot be read, or is gone.
        """
        change = self._link.change
        with reported("read the file"), path.open("rb") as file:
            length = os.fstat(file.fileno()).st_size
            chunks = -(-length // _CHUNK)
            size = f"{length} {chunks}"
            change(self._begin, [BLOBS], [digest, f"{_PARTIAL.decode()} {size}"])
            for index in range(chunks):
                change(self._check, [], [])
                self._redis.set(chunk_key(digest, index), file.read(_CHUNK))
            change(self._finish, [BLOBS, DAMAGED], [digest, f"{_COMPLETE.decode()} {size}"])

    def receive(self, digest: str) -> tuple[Path, float]:
        """Read a blob into quarantine, verified, and say how many seconds that took.

        A damaged one is reported to all servers on this Redis: one that has a sound copy writes it anew.

        Raises:
            ExpertUnavailableError: there is none, or its bytes are damaged.
            StoreError: the disk fails, or is full.
        """
        began = time.perf_counter()
        state, _, chunks = self._entry(digest)
        if state != _COMPLETE:
            raise ExpertUnavailableError(f"the stored bytes of {digest[:12]}… are gone; upload the expert again")
        path: Path | None = None
        found = hashlib.sha256()
        try:
            # The end of what was written reaches the disk only as the file is closed.
            with (
                reported("cache the file"),
                tempfile.NamedTemporaryFile(dir=self._quarantine, prefix="fetch-", delete=False) as file,
            ):
                path = Path(file.name)
                for index in range(chunks):
                    chunk = self._redis.get(chunk_key(digest, index)) or b""
                    found.update(chunk)
                    file.write(chunk)
            if found.hexdigest() != digest:
                self._report(digest)
                raise ExpertDamagedError(
                    f"the bytes of {digest[:12]}… in Redis are damaged; a server that has a copy puts it back, "
                    "otherwise upload the expert again"
                )
        except BaseException:
            if path is not None:
                discard(path)
            raise
        seconds = time.perf_counter() - began
        self._meter.loaded(seconds)
        return path, seconds

    def is_complete(self, digest: str) -> bool:
        """Whether a blob is there, be it damaged."""
        return self._entry(digest)[0] == _COMPLETE

    def size(self, digest: str) -> int | None:
        """Bytes of a blob; None if there is none, or it was never finished."""
        state, size, _ = self._entry(digest)
        return size if state == _COMPLETE else None

    def forget(self, digest: str) -> None:
        """Delete a blob. The lease is held."""
        chunks = self._entry(digest)[2]
        self._link.change(self._forget, [BLOBS, DAMAGED], [digest, chunks, chunk_key(digest)])

    def digests(self) -> set[str]:
        """All blobs, those that were never finished among them."""
        return {digest.decode() for digest in self._redis.hkeys(BLOBS)}

    def reported(self) -> set[str]:
        """Blobs that somebody found damaged and nobody has healed or deleted since."""
        return {digest.decode() for digest in self._redis.smembers(DAMAGED)}

    def _report(self, digest: str) -> None:
        self._meter.damaged(digest)
        with suppress(redis.exceptions.RedisError):  # a full Redis takes no report; the next reader reports again
            self._redis.sadd(DAMAGED, digest)

    def _entry(self, digest: str) -> tuple[bytes, int, int]:
        """State, bytes and chunks of a blob."""
        entry = (self._redis.hget(BLOBS, digest) or b"gone 0 0").split()
        return entry[0], int(entry[1]), int(entry[2])


def discard(path: Path) -> None:
    """Remove a file of the quarantine that may have been taken over; what fails is left to the next start."""
    with suppress(OSError):
        path.unlink(missing_ok=True)
