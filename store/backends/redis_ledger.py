"""The ledger of a shared store, in Redis.

    switchyard:ledger:KIND          hash    name → document
    switchyard:ledger:sums:KIND     hash    name → sum
    switchyard:ledger:bucket:NAME   hash    level, and when that was, by Redis's clock
    switchyard:ledger:edition       counter of changes; each is published on the channel `switchyard:ledger`
    switchyard:ledger:word          a random word of the last change

Documents are held in memory and followed by a listener, so that checking a key asks Redis nothing, and a key that is
revoked is refused everywhere within milliseconds. While Redis is away, what was known last counts, and each server
grants rates by buckets of its own.

The edition alone does not tell whether anything is new: where Redis comes back from an older copy, it has lost changes,
and just as many others may have been made by the time that somebody looks. Hence the word.
"""

from __future__ import annotations

import logging
import random
import threading
import uuid
from collections.abc import Mapping

from store.backends.ledger import Balance, LocalBuckets, Rate
from store.backends.redis_link import RedisLink
from store.errors import StoreError, StoreUnavailableError

_log = logging.getLogger(__name__)

_PREFIX = "switchyard:ledger"
_CHANNEL = _PREFIX
_EDITION = f"{_PREFIX}:edition"
_WORD = f"{_PREFIX}:word"
_POLL_SECONDS = 0.25
_LONGEST_PAUSE = 5.0

_PUT = """
if ARGV[4] == '1' and redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1 then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('SET', KEYS[3], ARGV[5])
redis.call('PUBLISH', ARGV[3], redis.call('INCR', KEYS[2]))
return 1
"""
_DELETE = """
if redis.call('HDEL', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('SET', KEYS[3], ARGV[3])
redis.call('PUBLISH', ARGV[2], redis.call('INCR', KEYS[2]))
return 1
"""
_TAKE = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
local capacity, rate, cost, least = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local known = redis.call('HMGET', KEYS[1], 'level', 'at')
local level = capacity
if known[1] then level = math.min(capacity, tonumber(known[1]) + math.max(0, now - tonumber(known[2])) * rate) end
local granted = level >= least
if granted then level = level - cost end
redis.call('HSET', KEYS[1], 'level', string.format('%.17g', level), 'at', string.format('%.17g', now))
redis.call('PEXPIRE', KEYS[1], math.ceil((capacity - level) / rate * 1000) + 1000)
return {granted and 1 or 0, string.format('%.17g', level)}
"""


class RedisLedger:
    """`Ledger` in Redis.

    Args:
        url: redis://, rediss:// or unix://.
        timeout: seconds to wait for an answer.

    Raises:
        InvalidRequestError: the address is malformed.
        StoreError: Redis cannot be reached.
    """

    def __init__(self, url: str, *, timeout: float = 5.0) -> None:
        self._link = RedisLink(url, timeout=timeout, lease_seconds=10.0)
        self._redis = self._link.client
        script = self._redis.register_script
        self._put, self._delete, self._take = script(_PUT), script(_DELETE), script(_TAKE)
        self._reading = threading.Lock()
        self._documents: dict[str, Mapping[str, bytes]] = {}
        self._seen: tuple[int, bytes | None] = -1, None
        self._changes = 0
        self._buckets = LocalBuckets()
        self._closing = threading.Event()
        try:
            self._refresh()
        except StoreError:
            self._link.close()
            raise
        self._listener = threading.Thread(target=self._listen, name="ledger-listener", daemon=True)
        self._listener.start()

    def close(self) -> None:
        """See `Ledger.close`."""
        self._closing.set()
        self._listener.join()
        self._link.close()

    def edition(self) -> int:
        """See `Ledger.edition`."""
        return self._changes

    def documents(self, kind: str) -> Mapping[str, bytes]:
        """See `Ledger.documents`. Those that were known last, if Redis is away."""
        with self._reading:
            known = self._documents.get(kind)
            if known is None:
                with self._link.reported("read the ledger"):
                    known = self._read(kind)
                self._documents[kind] = known
            return known

    def put(self, kind: str, name: str, data: bytes, *, absent: bool = False) -> bool:
        """See `Ledger.put`."""
        with self._link.reported("write to the ledger"):
            keys = [f"{_PREFIX}:{kind}", _EDITION, _WORD]
            done = bool(self._put(keys=keys, args=[name, data, _CHANNEL, int(absent), uuid.uuid4().hex]))
        self._refresh()
        return done

    def delete(self, kind: str, name: str) -> bool:
        """See `Ledger.delete`."""
        with self._link.reported("write to the ledger"):
            keys = [f"{_PREFIX}:{kind}", _EDITION, _WORD]
            done = bool(self._delete(keys=keys, args=[name, _CHANNEL, uuid.uuid4().hex]))
        self._refresh()
        return done

    def add(self, kind: str, amounts: Mapping[str, int]) -> None:
        """See `Ledger.add`."""
        with self._link.reported("write to the ledger"), self._redis.pipeline(transaction=True) as pipeline:
            for name, amount in amounts.items():
                pipeline.hincrby(f"{_PREFIX}:sums:{kind}", name, amount)
            pipeline.execute()

    def sums(self, kind: str) -> Mapping[str, int]:
        """See `Ledger.sums`."""
        with self._link.reported("read the ledger"):
            found: Mapping[bytes, bytes] = self._redis.hgetall(f"{_PREFIX}:sums:{kind}")
        return {name.decode(): int(value) for name, value in found.items()}

    def take(self, bucket: str, rate: Rate, cost: float, *, least: float) -> Balance:
        """See `Ledger.take`. While Redis is away, of this process."""
        try:
            with self._link.reported("count requests"):
                arguments = [rate.capacity, rate.per_second, cost, least]
                granted, level = self._take(keys=[f"{_PREFIX}:bucket:{bucket}"], args=arguments)
        except StoreUnavailableError:
            with self._reading:
                return self._buckets.take(bucket, rate, cost, least=least)
        return Balance(bool(granted), float(level))

    def _refresh(self) -> None:
        """Read again what is held here, if anything has changed."""
        with self._reading, self._link.reported("read the ledger"):
            edition, word = self._redis.mget(_EDITION, _WORD)
            newest = int(edition or 0), word
            if newest == self._seen:
                return
            self._documents = {kind: self._read(kind) for kind in self._documents}
            # What changed meanwhile is read again next time: the edition is older than what was read.
            self._seen = newest
            self._changes += 1

    def _read(self, kind: str) -> Mapping[str, bytes]:
        found: Mapping[bytes, bytes] = self._redis.hgetall(f"{_PREFIX}:{kind}")
        return {name.decode(): found[name] for name in sorted(found)}

    def _listen(self) -> None:
        """Follow Redis until the ledger is closed; after a failure, try again after a pause that grows."""
        pause = 0.1
        while not self._closing.is_set():
            try:
                with self._link.reported("listen"), self._redis.pubsub(ignore_subscribe_messages=True) as channel:
                    channel.subscribe(_CHANNEL)
                    while not self._closing.is_set():
                        self._refresh()
                        pause = 0.1
                        channel.get_message(timeout=_POLL_SECONDS)
            except StoreError as error:
                if pause == 0.1 and not self._closing.is_set():
                    _log.warning("%s; the API keys that were known last count on", error.message)
            except Exception:  # a bug of ours: were it the last of this thread, revoked keys would be let in for good
                _log.exception("the ledger cannot be followed; trying again")
            self._closing.wait(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, _LONGEST_PAUSE)
