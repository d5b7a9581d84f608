"""The connection to Redis: our errors for its own, scripts that change the catalogue, and the lease of one writer."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from store.errors import InvalidRequestError, StorageFullError, StoreError, StoreUnavailableError

SCHEMES = ("redis://", "rediss://", "unix://")
CHANNEL = "switchyard:changed"
LEASE = "switchyard:lease"
EPOCH = "switchyard:epoch"
"""A random word, made with the store: another one, or none, tells that Redis has lost everything."""
EDITION = "switchyard:edition"
RECORDS = "switchyard:records"
"""Hash: name → record."""
CHANGES = "switchyard:changes"
"""Sorted set: name → the edition in which it changed last."""
HISTORY = "switchyard:history"
"""Sorted set: a random word for every change → its edition. Where Redis has come back from an older copy, the words of
the changes that it has lost are gone, even if just as many have been made since."""
REMEMBERED = 10_000
"""How many changes have words."""
BLOBS = "switchyard:blobs"
"""Hash: digest → "complete BYTES CHUNKS", or "partial ..." while the chunks are on their way."""
DAMAGED = "switchyard:damaged"
"""Set: digests of blobs whose bytes somebody found damaged."""

IDLE = "switchyard:idle"
"""Hash: digest → since when it has been without a record, by Redis's clock in seconds since 1970."""

IF_HELD = "if redis.call('GET', KEYS[1]) ~= ARGV[1] then return redis.error_reply('LEASE lost') end\n"
"""How a script for `RedisLink.change` begins."""
_TELL = f"""
local edition = redis.call('INCR', KEYS[4])
redis.call('ZADD', KEYS[3], edition, ARGV[2])
redis.call('ZREMRANGEBYSCORE', KEYS[5], edition, '+inf')
redis.call('ZADD', KEYS[5], edition, ARGV[4])
redis.call('ZREMRANGEBYSCORE', KEYS[5], '-inf', edition - {REMEMBERED})
redis.call('PUBLISH', ARGV[3], edition)
return 1
"""
_PUT = f"""{IF_HELD}
local present = redis.call('HGET', KEYS[2], ARGV[2])
if present == ARGV[5] then return 1 end -- the answer to the first attempt was lost on its way
if ARGV[6] == 'absent' and present then return 0 end
if ARGV[6] == 'equal' and present ~= ARGV[7] then return 0 end
redis.call('HSET', KEYS[2], ARGV[2], ARGV[5])
{_TELL}"""
_DELETE = f"""{IF_HELD}
if redis.call('HDEL', KEYS[2], ARGV[2]) == 0 then return 0 end
{_TELL}"""
_NOTE = f"""{IF_HELD}
redis.call('HDEL', KEYS[2], unpack(ARGV, 2)) -- needs no memory: what follows may then go on in a full Redis
local now = redis.call('TIME')[1]
for i = 2, #ARGV do redis.call('HSET', KEYS[2], ARGV[i], now) end
return 1
"""
_UNNOTE = f"""{IF_HELD}
return redis.call('HDEL', KEYS[2], unpack(ARGV, 2))
"""
_ACQUIRE = """
local holder = redis.call('GET', KEYS[1])
if holder == ARGV[1] then return 1 end -- the answer to the first attempt was lost on its way
if holder then return 0 end
redis.call('DEL', KEYS[1]) -- after a first write that needs no memory, a script may go on: deleting must always work
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
_RENEW = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('PEXPIRE', KEYS[1], ARGV[2]) end return 0"
_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"
_CATALOGUE = (RECORDS, CHANGES, EDITION, HISTORY)
"""The keys of `_PUT` and `_DELETE`, behind the lease."""

_PROBE_SECONDS = 1.0
"""How long an answer is waited for of a Redis that gave none before, and for how long nobody else waits then."""


class RedisLink:
    """One Redis server. Thread-safe.

    Every change of records, notes and what is said of blobs goes through a script that first checks the lease: a holder
    that slept through its end changes nothing. Only chunks are too large for scripts and written by themselves: they
    count for nothing until their blob is called complete.

    Once Redis has given no answer, whoever asks next does not wait as long for the same: they are refused until it
    answers a short question. A crowd of uploads is so refused in the time of one.

    Args:
        url: redis://, rediss:// or unix://.
        timeout: seconds to wait for an answer.
        lease_seconds: how long a holder that died is waited for; renewed while it lives.

    Raises:
        InvalidRequestError: the address is malformed.
    """

    def __init__(self, url: str, *, timeout: float, lease_seconds: float) -> None:
        try:
            # One more attempt, without a pause: a pooled connection may have gone stale. Pauses are the caller's.
            retry = Retry(NoBackoff(), 1)
            self.client: Any = redis.Redis.from_url(
                url, socket_timeout=timeout, socket_connect_timeout=timeout, retry=retry
            )
        except (ValueError, TypeError) as error:
            raise InvalidRequestError(f"the address of the store is malformed: {error}", param="store") from None
        patience = min(timeout, _PROBE_SECONDS)
        self._prober: Any = redis.Redis.from_url(
            url, socket_timeout=patience, socket_connect_timeout=patience, retry=Retry(NoBackoff(), 0)
        )
        self._probing = threading.Lock()
        self._away, self._probed = False, 0.0
        parts = urlsplit(url)
        self.where = f"Redis at {parts.hostname or parts.path or 'localhost'}"
        """For messages; holds no password."""
        self._lease_seconds = lease_seconds
        self._token = b""
        self._thread_lock = threading.RLock()
        self._depth = 0
        script = self.client.register_script
        self._put, self._delete = script(_PUT), script(_DELETE)
        self._note, self._unnote = script(_NOTE), script(_UNNOTE)
        self._take, self._renew, self._release = script(_ACQUIRE), script(_RENEW), script(_RELEASE)

    def close(self) -> None:
        self.client.close()
        self._prober.close()

    @contextmanager
    def reported(self, action: str) -> Iterator[None]:
        """Turn Redis's errors into ours; the messages name no password.

        Raises:
            StoreUnavailableError: Redis cannot be reached, or could not a moment ago: then nothing was tried.
        """
        if not self._answers():
            raise StoreUnavailableError(f"cannot {action}: {self.where} cannot be reached")
        try:
            yield
        except redis.exceptions.OutOfMemoryError:
            raise StorageFullError(f"cannot {action}: {self.where} has no memory left (maxmemory)") from None
        except redis.exceptions.AuthenticationError:
            raise StoreError(f"cannot {action}: {self.where} refuses our name or password") from None
        except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError) as error:
            self._away = True
            raise StoreUnavailableError(f"cannot {action}: {self.where} cannot be reached") from error
        except redis.exceptions.RedisError as error:
            kind, _, rest = str(error).partition(" ")
            if kind in ("LEASE", "MISCONF", "READONLY", "LOADING"):
                raise StoreUnavailableError(f"cannot {action}: {self.where} says: {rest or kind}") from None
            if "OOM" in str(error):  # in a script
                raise StorageFullError(f"cannot {action}: {self.where} has no memory left (maxmemory)") from None
            raise StoreError(f"cannot {action}: {self.where} says: {error}") from None

    @contextmanager
    def exclusive(self) -> Iterator[bool]:
        """Hold the lease. Reentrant in a thread; renewed in the background. Tells whether this took it.

        Raises:
            StoreUnavailableError: another writer holds it for too long.
        """
        with self._thread_lock:
            if self._depth:
                self._depth += 1
                try:
                    yield False
                finally:
                    self._depth -= 1
                return
            self._acquire()
            done = threading.Event()
            renewing = threading.Thread(target=self._keep, args=(done,), name="lease", daemon=True)
            renewing.start()
            self._depth = 1
            try:
                yield True
            finally:
                self._depth = 0
                done.set()
                if not self._away:  # else it ends by itself
                    renewing.join()
                    with suppress(redis.exceptions.RedisError):
                        self._release(keys=[LEASE], args=[self._token])

    def put_record(self, name: str, data: bytes, mode: str, expected: bytes) -> bool:
        """Compare and set, and tell everyone. The lease is held."""
        return bool(self.change(self._put, _CATALOGUE, [name, CHANNEL, _word(), data, mode, expected]))

    def delete_record(self, name: str) -> bool:
        """Delete, and tell everyone. The lease is held."""
        return bool(self.change(self._delete, _CATALOGUE, [name, CHANNEL, _word()]))

    def change(self, script: Any, keys: Sequence[str], arguments: Sequence[str | bytes | int]) -> Any:
        """Run a script that begins with `IF_HELD`. The lease is held."""
        return script(keys=[LEASE, *keys], args=[self._token, *arguments])

    def note_idle(self, digests: Collection[str], *, idle: bool) -> None:
        """Note blobs as idle from now on, or take the notes back. The lease is held."""
        script = self._note if idle else self._unnote
        several = sorted(digests)
        for start in range(0, len(several), 1000):  # Lua's unpack has a limit
            self.change(script, [IDLE], several[start : start + 1000])

    def idle(self) -> dict[str, float]:
        """Digest → seconds since it was noted."""
        seconds, microseconds = self.client.time()
        now = seconds + microseconds / 1e6
        notes: Mapping[bytes, bytes] = self.client.hgetall(IDLE)
        return {digest.decode(): max(0.0, now - int(since)) for digest, since in notes.items()}

    def _answers(self) -> bool:
        """False while Redis gives no answer. One that hangs is asked again once a second, by one for all."""
        if not self._away:
            return True
        with self._probing:
            if not self._away:
                return True
            if time.monotonic() < self._probed + _PROBE_SECONDS:
                return False
            try:
                self._prober.ping()
            except redis.exceptions.AuthenticationError:
                pass  # an answer; whoever asks is told
            except redis.exceptions.ConnectionError:
                return False  # known at once: nothing to spare others
            except redis.exceptions.TimeoutError:
                self._probed = time.monotonic()
                return False
            except redis.exceptions.RedisError:
                pass
            self._away = False
            return True

    def _acquire(self) -> None:
        deadline = time.monotonic() + 3 * self._lease_seconds
        with self.reported("lock the store"):
            # One that hung may have given us the lease after we had gone, or keep it for us: it is handed back first.
            self._release(keys=[LEASE], args=[self._token])
            self._token = uuid.uuid4().hex.encode()
            while not self._take(keys=[LEASE], args=[self._token, int(1000 * self._lease_seconds)]):
                if time.monotonic() > deadline:
                    raise StoreUnavailableError("the store is held by another writer; try again soon")
                time.sleep(0.01)

    def _keep(self, done: threading.Event) -> None:
        while not done.wait(self._lease_seconds / 3):
            with suppress(redis.exceptions.RedisError):
                self._renew(keys=[LEASE], args=[self._token, int(1000 * self._lease_seconds)])


def _word() -> str:
    return uuid.uuid4().hex


def chunk_key(digest: str, index: int | str = "") -> str:
    """Where a chunk of a blob is."""
    return f"switchyard:blob:{digest}:{index}"
