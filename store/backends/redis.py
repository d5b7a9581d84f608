"""The shared store: a Redis server that several Switchyards use, with a disk cache in front of it.

    switchyard:records     hash    name → record
    switchyard:changes     zset    name → edition of its last change
    switchyard:edition     counter of changes; each is published on the channel `switchyard:changed`
    switchyard:history     zset    random word of a change → its edition
    switchyard:epoch       a random word, made with the store
    switchyard:lease       token of the one writer, with an end
    switchyard:idle        hash    digest → since when it has been without a record
    switchyard:blobs       hash    digest → state, bytes, chunks
    switchyard:blob:D:I    chunk I of the blob D
    switchyard:damaged     set     digests of blobs that somebody found damaged

The catalogue is held in memory, so that neither looking up an expert nor listing them asks Redis, and what is known
goes on being served while Redis is away. A listener keeps it up to date: at once by the channel, and by asking for the
edition several times a second, whatever happens to messages.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from store.backends import ABSENT, ANYTHING, Expect, Health
from store.backends.blob_cache import BlobCache
from store.backends.redis_blobs import RedisBlobs, discard
from store.backends.redis_link import CHANNEL, RECORDS, RedisLink
from store.backends.redis_mirror import RedisMirror
from store.errors import ExpertUnavailableError, StoreError, StoreUnavailableError
from store.tiers import Tier, TierMeter, TierStats

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.25
_LONGEST_PAUSE = 5.0

Copy = TypeVar("Copy", Path, bytes)


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
        self._meter = TierMeter(Tier.STORE)
        self._blobs = RedisBlobs(self._link, self._cache.quarantine(), self._meter)
        self._mirror = RedisMirror(self._link)
        self._fetching = [threading.Lock() for _ in range(16)]
        self._heal_at = 0.0
        self._closing = threading.Event()
        try:
            self._mirror.join()
            self._mirror.refresh()
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
            self._blobs.send(path, digest)
        self._cache.add(path, digest)

    def fetch(self, digest: str) -> Path:
        """See `BlobStore.fetch`. A damaged copy in the cache is replaced from Redis."""
        return self._local(digest, self._cache.get)

    def read(self, digest: str) -> bytes:
        """See `BlobStore.read`. A damaged copy in the cache is replaced from Redis."""
        return self._local(digest, self._cache.read)

    def delete_blob(self, digest: str) -> None:
        """See `BlobStore.delete_blob`."""
        with self.exclusive(), self._link.reported("delete the file"):
            self._blobs.forget(digest)
        self._cache.drop(digest)

    def blobs(self) -> set[str]:
        """See `BlobStore.blobs`. Those that were never finished are among them, for the garbage collection."""
        with self._link.reported("list the store"):
            return self._blobs.digests()

    def blob_bytes(self, digest: str) -> int | None:
        """See `BlobStore.blob_bytes`."""
        with self._link.reported("look at the file"):
            return self._blobs.size(digest)

    def idle(self) -> Mapping[str, float]:
        """See `BlobStore.idle`."""
        with self._link.reported("read the notes"):
            return self._link.idle()

    def note_idle(self, digests: Collection[str]) -> None:
        """See `BlobStore.note_idle`."""
        with self.exclusive(), self._link.reported("keep the notes"):
            self._link.note_idle(digests, idle=True)

    def forget_idle(self, digests: Collection[str]) -> None:
        """See `BlobStore.forget_idle`."""
        with self.exclusive(), self._link.reported("keep the notes"):
            self._link.note_idle(digests, idle=False)

    def verify(self, digest: str, *, repair: bool) -> Health:
        """See `BlobStore.verify`. Redis's copy and the cache's heal each other."""
        cached = self._cache.check(digest)
        with self._link.reported("read the file"):
            try:
                received, seconds = self._blobs.receive(digest)
            except ExpertUnavailableError:
                found = Health.DAMAGED if self._blobs.is_complete(digest) else Health.GONE
            else:
                found = Health.SOUND
        if found is Health.SOUND:
            try:
                if cached is not Health.DAMAGED or not repair:
                    return Health.SOUND if cached is not Health.DAMAGED else Health.DAMAGED
                self._cache.add(received, digest, seconds)
            finally:
                discard(received)
            self._cache.meter.healed(digest, Tier.STORE)
            return Health.HEALED
        if cached is not Health.SOUND or not repair:
            return found
        self._put_back(digest)
        return Health.HEALED

    def put_record(self, name: str, data: bytes, *, expected: bytes | Expect) -> bool:
        """See `BlobStore.put_record`."""
        mode = {ABSENT: "absent", ANYTHING: "any"}[expected] if isinstance(expected, Expect) else "equal"
        with self.exclusive(), self._link.reported("store the record"):
            done = self._link.put_record(name, data, mode, expected if isinstance(expected, bytes) else b"")
        self._mirror.refresh()  # first: at no instant is it in neither
        self._mirror.found_again(name)
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
        self._mirror.found_again(name)
        self._mirror.refresh()
        return done

    def records(self) -> dict[str, bytes]:
        """See `BlobStore.records`."""
        return self._mirror.records()

    def edition(self) -> int:
        """See `BlobStore.edition`. This process's own count: Redis's may go back when it is restarted from a copy."""
        return self._mirror.edition

    def lost(self) -> Mapping[str, bytes]:
        """See `BlobStore.lost`."""
        return self._mirror.lost

    def tiers(self) -> tuple[TierStats, ...]:
        """See `BlobStore.tiers`."""
        return self._cache.stats(), self._meter.stats()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """See `BlobStore.exclusive`."""
        with self._link.exclusive() as is_outermost:
            if is_outermost:  # what other holders changed before is seen from here on
                self._mirror.refresh()
            yield

    def _local(self, digest: str, take: Callable[[str], Copy | None]) -> Copy:
        """What `take` finds in the cache; if it is not there, it is brought there first."""
        with self._fetching[int(digest[0], 16)]:
            cached = take(digest)
            self._cache.meter.looked_up(found=cached is not None)
            if cached is not None:
                return cached
            try:
                with self._link.reported("read the file"):
                    path, seconds = self._blobs.receive(digest)
                try:
                    self._cache.add(path, digest, seconds)
                finally:
                    discard(path)  # a disk that is full needs the room
            except StoreUnavailableError as error:
                raise ExpertUnavailableError(f"{digest[:12]}… is not on this machine: {error.message}") from error
            brought = take(digest)
            if brought is None:
                raise ExpertUnavailableError(f"the copy of {digest[:12]}… vanished from this machine's disk; try again")
            return brought

    def _put_back(self, digest: str) -> None:
        """Write a blob anew that Redis has lost or damaged, from the cache."""
        sound = self._cache.get(digest)
        if sound is None:
            return
        with self.exclusive(), self._link.reported("repair the file"):
            self._blobs.send(sound, digest)
        self._meter.healed(digest, Tier.CACHE)

    def _heal_reported(self) -> None:
        """Write anew what another server found damaged, if this one has it. What fails is tried again later."""
        if time.monotonic() < self._heal_at:
            return
        with self._link.reported("repair the file"):
            for digest in self._blobs.reported():
                if self._cache.has(digest):
                    try:
                        with self.exclusive():
                            if digest in self._blobs.reported():  # neither deleted nor healed meanwhile
                                self._put_back(digest)
                    except StoreUnavailableError:
                        raise
                    except StoreError as error:  # Redis is full, or the copy has just made room for others
                        _log.warning("%s… is not healed: %s", digest[:12], error.message)
                        self._heal_at = time.monotonic() + _LONGEST_PAUSE

    def _listen(self) -> None:
        """Follow Redis until the store is closed; after a failure, try again after a pause that grows."""
        pause, away = 0.1, False
        while not self._closing.is_set():
            try:
                with self._link.reported("listen"), self._redis.pubsub(ignore_subscribe_messages=True) as channel:
                    channel.subscribe(CHANNEL)
                    while not self._closing.is_set():
                        self._mirror.refresh()
                        if away:
                            _log.warning("%s is back", self._link.where)
                        away = False
                        self._heal_reported()
                        pause = 0.1
                        channel.get_message(timeout=_POLL_SECONDS)
            except StoreError as error:
                if not away and not self._closing.is_set():
                    _log.warning("%s; experts that are on this machine are served on", error.message)
                away = True
            except Exception:  # a bug of ours: were it the last of this thread, nothing new would be seen for good
                _log.exception("the store cannot be followed; trying again")
            self._closing.wait(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, _LONGEST_PAUSE)
