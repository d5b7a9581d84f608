"""The catalogue of a shared store, held in memory: what is known is served on while Redis is away."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Mapping

from store.backends.redis_link import CHANGES, EDITION, EPOCH, HISTORY, RECORDS, REMEMBERED, RedisLink

_log = logging.getLogger(__name__)

_NEAR = 1000
"""A reader that is farther behind reads the whole catalogue."""

# No transaction: a full Redis refuses those, whatever is in them.
_LOOK = """
local last = redis.call('ZRANGE', KEYS[3], -1, -1, 'WITHSCORES')
local ours = redis.call('ZSCORE', KEYS[3], ARGV[1])
return {redis.call('GET', KEYS[1]), redis.call('GET', KEYS[2]), last[1] or false, last[2] or false, ours}
"""


class RedisMirror:
    """All records of one Redis. Thread-safe; as new as the last `refresh`.

    Attributes:
        edition: this process's own count of changes: Redis's may go back when it is restarted from a copy.
    """

    def __init__(self, link: RedisLink) -> None:
        self._link = link
        self._redis = link.client
        self._ask = self._redis.register_script(_LOOK)
        self._refreshing = threading.Lock()
        # What Redis has, and what it has lost: replaced together, so that whoever reads meanwhile finds each in one.
        self._held: tuple[Mapping[str, bytes], Mapping[str, bytes]] = {}, {}
        self.edition = 0
        self._epoch = b""
        self._seen = -1
        self._word: bytes | None = None
        """That of the edition seen last; None where it has none: a server of an earlier version made it."""

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
            epoch, newest, word, ours = self._look()
            known, lost = self._held
            if epoch == self._epoch and (newest, word) == (self._seen, self._word):
                return
            has_lost = "the catalogue" if epoch != self._epoch else self._missing(newest, ours)
            if has_lost:
                if epoch != self._epoch:
                    self.join()
                lost = {**lost, **known}
                self._held = known, lost
                _log.error("%s has lost %s; %d experts were known here", self._link.where, has_lost, len(lost))
                self._seen, self._word = -1, None  # should what follows fail, everything is still read next time
            if self._word is not None and ours == self._seen and newest <= self._seen + _NEAR:
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
            self._seen, self._word = newest, word
            self.edition += 1

    def _look(self) -> tuple[bytes | None, int, bytes | None, int | None]:
        """Redis's epoch, its edition, the word of that edition, and which edition has the word that was seen last.

        All as of one instant: a word would else be taken for that of another edition.
        """
        found: list[bytes | None] = self._ask(keys=[EPOCH, EDITION, HISTORY], args=[self._word or b""])
        epoch, edition, word, of_word, ours = found
        newest = int(edition or 0)
        return epoch, newest, word if int(of_word or -1) == newest else None, None if ours is None else int(ours)

    def _missing(self, newest: int, ours: int | None) -> str:
        """What Redis lacks if it has come back from an older copy, in words; empty if it has not.

        Its edition alone does not tell: just as many changes may have been made since. Where what was seen last has no
        word, or was so long ago that its word is forgotten, what Redis has now is believed.
        """
        is_gone = self._word is not None and ours != self._seen and newest < self._seen + REMEMBERED
        return "changes that were seen here" if newest < self._seen or is_gone else ""

    def found_again(self, name: str) -> None:
        """A record was written or deleted: it is not lost any more."""
        with self._refreshing:
            records, lost = self._held
            if name in lost:
                self._held = records, {other: data for other, data in lost.items() if other != name}
                self.edition += 1
