"""The catalogue of a shared store, held in memory: what is known is served on while Redis is away."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Mapping

from store.backends.redis_link import CHANGES, EDITION, EPOCH, RECORDS, RedisLink

_log = logging.getLogger(__name__)

_NEAR = 1000
"""A reader that is farther behind reads the whole catalogue."""


class RedisMirror:
    """All records of one Redis. Thread-safe; as new as the last `refresh`.

    Attributes:
        edition: this process's own count of changes: Redis's may go back when it is restarted from a copy.
    """

    def __init__(self, link: RedisLink) -> None:
        self._link = link
        self._redis = link.client
        self._refreshing = threading.Lock()
        # What Redis has, and what it has lost: replaced together, so that whoever reads meanwhile finds each in one.
        self._held: tuple[Mapping[str, bytes], Mapping[str, bytes]] = {}, {}
        self.edition = 0
        self._epoch, self._seen = b"", -1

    def records(self) -> dict[str, bytes]:
        """All records by name, in order; those that are lost included."""
        records, lost = self._held
        return dict(sorted({**lost, **records}.items()))

    @property
    def lost(self) -> Mapping[str, bytes]:
        """Records that were here and that Redis has lost since, by name."""
        return self._held[1]

    def join(self) -> None:
        """Make the store's epoch where there is none, and take note of it.

        Raises:
            StoreError: Redis failed.
        """
        with self._link.reported("open the store"):
            self._redis.set(EPOCH, uuid.uuid4().hex, nx=True)
            self._epoch = self._redis.get(EPOCH)
            newest = int(self._redis.get(EDITION) or 0)
            self._redis.zremrangebyscore(CHANGES, "-inf", newest - 10 * _NEAR)

    def refresh(self) -> None:
        """Bring the records up to date.

        Raises:
            StoreError: Redis failed; the records are what they were.
        """
        with self._refreshing, self._link.reported("read the catalogue"):
            epoch, edition = self._redis.mget(EPOCH, EDITION)
            newest = int(edition or 0)
            known, lost = self._held
            if epoch != self._epoch:
                self.join()
                lost = {**lost, **known}
                self._held = known, lost
                _log.error("%s has lost the catalogue; %d experts were known here", self._link.where, len(lost))
                self._seen = -1
            elif newest < self._seen:
                _log.error("%s has lost its last %d changes", self._link.where, self._seen - newest)
            if newest == self._seen:
                return
            if 0 <= self._seen < newest <= self._seen + _NEAR:
                records = dict(known)
                names = self._redis.zrangebyscore(CHANGES, f"({self._seen}", "+inf")
                for name, data in zip(names, self._redis.hmget(RECORDS, names) if names else (), strict=True):
                    if data is None:
                        records.pop(name.decode(), None)
                    else:
                        records[name.decode()] = data
            else:
                records = {name.decode(): data for name, data in self._redis.hgetall(RECORDS).items()}
            # What changed meanwhile is read again next time: the edition is older than what was read.
            self._held = records, {name: data for name, data in lost.items() if name not in records}
            self._seen = newest
            self.edition += 1

    def found_again(self, name: str) -> None:
        """A record was written or deleted: it is not lost any more."""
        with self._refreshing:
            records, lost = self._held
            if name in lost:
                self._held = records, {other: data for other, data in lost.items() if other != name}
                self.edition += 1
