"""The shared store: a Redis server that several Switchyards use, with a disk cache in front of it.

    switchyard:records     hash    name → record
    switchyard:changes     zset    name → edition of its last change
    switchyard:edition     counter of changes; each is published on the channel `switchyard:changed`
    switchyard:epoch       a random word, made with the store
    switchyard:lease       token of the one writer, with an end
    switchyard:blobs       hash    digest → state, bytes, chunks
    switchyard:blob:D:I    chunk I of the blob D

The catalogue is held in memory, so that neither looking up an expert nor listing them asks Redis, and what is known
goes on being served while Redis is away. A listener keeps it up to date: at once by the channel, and by asking for the
edition several times a second, whatever happens to messages.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import tempfile
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import redis

from store.backends import ABSENT, ANYTHING, Expect, Health
from store.backends.blob_cache import BlobCache
from store.backends.redis_link import BLOBS, CHANGES, CHANNEL, EDITION, EPOCH, RECORDS, RedisLink, chunk_key
from store.errors import ExpertUnavailableError, StoreError, StoreUnavailableError

_log = logging.getLogger(__name__)

_CHUNK = 8 << 20
"""Bytes of a chunk: Redis serves one command at a time, and others must get a word in."""
_POLL_SECONDS = 0.25
_LONGEST_PAUSE = 5.0
_NEAR = 1000
"""A reader that is farther behind reads the whole catalogue."""
_COMPLETE, _PARTIAL = b"complete", b"partial"


class RedisStore:
    """`BlobStore` in Redis.

    Args:
        url: redis://, rediss:// or unix://.
        cache: folder of the disk cache; several processes may share it.
        cache_bytes: most bytes in it.
        timeout: seconds to wait for an answer of Redis.
        lease_seconds: how long a writer that died is waited for.

    Raises:
        InvalidRequestError: the address is malformed.
        StoreError: Redis cannot be reached, or the folder cannot be used.
    """

    def __init__(
        self, url: str, cache: Path, *, cache_bytes: int, timeout: float = 5.0, lease_seconds: float = 10.0
    ) -> None:
        self._link = RedisLink(url, timeout=timeout, lease_seconds=lease_seconds)
        self._redis = self._link.client
        self._cache = BlobCache(cache, cache_bytes)
        self._refreshing = threading.Lock()
        self._fetching = [threading.Lock() for _ in range(16)]
        self._records: Mapping[str, bytes] = {}
        self._lost: Mapping[str, bytes] = {}
        self._epoch, self._seen, self._changes = b"", -1, 0
        self._closing = threading.Event()
        try:
            self._join()
            self._refresh()
        except StoreError:
            self.close()
            raise
        self._listener = threading.Thread(target=self._listen, name="redis-listener", daemon=True)
        self._listener.start()

    def close(self) -> None:
        """See `BlobStore.close`."""
        self._closing.set()
        if hasattr(self, "_listener"):
            self._listener.join()
        self._cache.close()
        self._link.close()

    def quarantine(self) -> Path:
        """See `BlobStore.quarantine`."""
        return self._cache.quarantine()

    def put_blob(self, path: Path, digest: str) -> None:
        """See `BlobStore.put_blob`."""
        with self.exclusive(), self._link.reported("store the file"):
            self._send(path, digest)
        self._cache.add(path, digest)

    def fetch(self, digest: str) -> Path:
        """See `BlobStore.fetch`. A damaged copy in the cache is replaced from Redis."""
        with self._fetching[int(digest[0], 16)]:
            cached = self._cache.get(digest)
            if cached is not None:
                return cached
            try:
                return self._cache.add(self._receive(digest), digest)
            except StoreUnavailableError as error:
                raise ExpertUnavailableError(f"{digest[:12]}… is not on this machine: {error.message}") from error

    def delete_blob(self, digest: str) -> None:
        """See `BlobStore.delete_blob`."""
        with self.exclusive(), self._link.reported("delete the file"):
            _, _, chunks = self._entry(digest)
            self._link.forget_blob(digest, chunks)
        self._cache.drop(digest)

    def blobs(self) -> set[str]:
        """See `BlobStore.blobs`. Those that were never finished are among them, for the garbage collection."""
        with self._link.reported("list the store"):
            return {digest.decode() for digest in self._redis.hkeys(BLOBS)}

    def verify(self, digest: str, *, repair: bool) -> Health:
        """See `BlobStore.verify`. Redis's copy is healed from the cache; the cache heals itself."""
        cached = self._cache.get(digest)
        try:
            self._receive(digest).unlink()
            return Health.SOUND
        except ExpertUnavailableError:
            with self._link.reported("read the file"):
                found = Health.DAMAGED if self._entry(digest)[0] == _COMPLETE else Health.GONE
        if cached is None or not repair:
            return found
        with self.exclusive(), self._link.reported("repair the file"):
            self._send(cached, digest)
        return Health.HEALED

    def put_record(self, name: str, data: bytes, *, expected: bytes | Expect) -> bool:
        """See `BlobStore.put_record`."""
        mode = {ABSENT: "absent", ANYTHING: "any"}[expected] if isinstance(expected, Expect) else "equal"
        with self.exclusive(), self._link.reported("store the record"):
            done = self._link.put_record(name, data, mode, expected if isinstance(expected, bytes) else b"")
        self._found_again(name)
        self._refresh()
        return done

    def get_record(self, name: str) -> bytes | None:
        """See `BlobStore.get_record`. Asks Redis: for whoever is about to change it."""
        with self._link.reported("read the record"):
            data: bytes | None = self._redis.hget(RECORDS, name)
        return data

    def delete_record(self, name: str) -> bool:
        """See `BlobStore.delete_record`."""
        with self.exclusive(), self._link.reported("delete the record"):
            done = self._link.delete_record(name)
        self._found_again(name)
        self._refresh()
        return done

    def records(self) -> dict[str, bytes]:
        """See `BlobStore.records`."""
        return dict(sorted({**self._lost, **self._records}.items()))

    def edition(self) -> int:
        """See `BlobStore.edition`. This process's own count: Redis's may go back when it is restarted from a copy."""
        return self._changes

    def lost(self) -> Mapping[str, bytes]:
        """See `BlobStore.lost`."""
        return self._lost

    def exclusive(self) -> AbstractContextManager[None]:
        """See `BlobStore.exclusive`."""
        return self._link.exclusive()

    def _join(self) -> None:
        """Make the store's epoch where there is none, and take note of it."""
        with self._link.reported("open the store"):
            self._redis.set(EPOCH, uuid.uuid4().hex, nx=True)
            self._epoch = self._redis.get(EPOCH)
            newest = int(self._redis.get(EDITION) or 0)
            self._redis.zremrangebyscore(CHANGES, "-inf", newest - 10 * _NEAR)

    def _refresh(self) -> None:
        """Bring the catalogue up to date.

        Raises:
            StoreError: Redis failed; the catalogue is what it was.
        """
        with self._refreshing, self._link.reported("read the catalogue"):
            epoch, edition = self._redis.mget(EPOCH, EDITION)
            newest = int(edition or 0)
            if epoch != self._epoch:
                self._join()
                self._lost = {**self._lost, **self._records}
                _log.error("%s has lost the catalogue; %d experts were known here", self._link.where, len(self._lost))
                self._seen = -1
            elif newest < self._seen:
                _log.error("%s has lost its last %d changes", self._link.where, self._seen - newest)
            if newest == self._seen:
                return
            if 0 <= self._seen < newest <= self._seen + _NEAR:
                records = dict(self._records)
                names = self._redis.zrangebyscore(CHANGES, f"({self._seen}", "+inf")
                for name, data in zip(names, self._redis.hmget(RECORDS, names) if names else (), strict=True):
                    if data is None:
                        records.pop(name.decode(), None)
                    else:
                        records[name.decode()] = data
            else:
                records = {name.decode(): data for name, data in self._redis.hgetall(RECORDS).items()}
            # What changed meanwhile is read again next time: the edition is older than what was read.
            self._records, self._seen = records, newest
            self._lost = {name: data for name, data in self._lost.items() if name not in records}
            self._changes += 1

    def _found_again(self, name: str) -> None:
        with self._refreshing:
            if name in self._lost:
                self._lost = {other: data for other, data in self._lost.items() if other != name}
                self._changes += 1

    def _listen(self) -> None:
        """Follow Redis until the store is closed; after a failure, try again after a pause that grows."""
        pause, away = 0.1, False
        while not self._closing.is_set():
            try:
                with self._link.reported("listen"), self._redis.pubsub(ignore_subscribe_messages=True) as channel:
                    channel.subscribe(CHANNEL)
                    while not self._closing.is_set():
                        self._refresh()
                        if away:
                            _log.warning("%s is back", self._link.where)
                        pause, away = 0.1, False
                        channel.get_message(timeout=_POLL_SECONDS)
            except StoreError as error:
                if not away and not self._closing.is_set():
                    _log.warning("%s; experts that are on this machine are served on", error.message)
                away = True
                self._closing.wait(pause * random.uniform(0.5, 1.5))
                pause = min(2 * pause, _LONGEST_PAUSE)

    def _send(self, path: Path, digest: str) -> None:
        """Write a file's chunks; the blob is complete after the last one. The lease is held."""
        chunks = -(-path.stat().st_size // _CHUNK)
        size = f"{path.stat().st_size} {chunks}"
        self._redis.hsetnx(BLOBS, digest, f"{_PARTIAL.decode()} {size}")
        with path.open("rb") as file:
            for index in range(chunks):
                self._redis.set(chunk_key(digest, index), file.read(_CHUNK))
        self._redis.hset(BLOBS, digest, f"{_COMPLETE.decode()} {size}")

    def _receive(self, digest: str) -> Path:
        """Read a blob into quarantine, verified.

        Raises:
            ExpertUnavailableError: there is none, or its bytes are damaged.
        """
        with self._link.reported("read the file"):
            state, _, chunks = self._entry(digest)
            if state != _COMPLETE:
                raise ExpertUnavailableError(f"the stored bytes of {digest[:12]}… are gone; upload the expert again")
            with tempfile.NamedTemporaryFile(dir=self.quarantine(), prefix="fetch-", delete=False) as file:
                path, found = Path(file.name), hashlib.sha256()
                try:
                    for chunk in self._chunks(digest, chunks):
                        found.update(chunk)
                        file.write(chunk)
                    if found.hexdigest() != digest:
                        raise ExpertUnavailableError(
                            f"the bytes of {digest[:12]}… in Redis are damaged; upload the expert again"
                        )
                except BaseException as error:
                    path.unlink()
                    if isinstance(error, OSError) and not isinstance(error, redis.exceptions.RedisError):
                        raise StoreError(f"cannot cache the file: {os.strerror(error.errno or 0)}") from error
                    raise
        return path

    def _chunks(self, digest: str, count: int) -> Iterator[bytes]:
        for index in range(count):
            yield self._redis.get(chunk_key(digest, index)) or b""

    def _entry(self, digest: str) -> tuple[bytes, int, int]:
        """State, bytes and chunks of a blob."""
        entry = (self._redis.hget(BLOBS, digest) or b"gone 0 0").split()
        return entry[0], int(entry[1]), int(entry[2])
