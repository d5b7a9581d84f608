"""Rates and usage: who may ask now, and who has spent how much."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from store.access import Caller
from store.backends.ledger import Balance, Ledger, Rate
from store.errors import RateLimitError, StoreError, SwitchyardError
from store.keys import Keys
from store.tenants import Tenants

ANYWAY = -math.inf
"""Take it, whatever is in the bucket."""
_NEVER_SECONDS = 3600.0

USAGE_FIELDS = ("requests", "prompt_tokens", "completion_tokens")


@dataclass(frozen=True)
class _Bucket:
    name: str
    unit: str
    """"requests" or "tokens"."""
    rate: Rate

    @property
    def cost(self) -> int:
        """Of a request that is let in: its tokens are known, and charged, later."""
        return 1 if self.unit == "requests" else 0


@dataclass(frozen=True)
class Level:
    """How full a caller's scarcest bucket of a unit is."""

    unit: str
    limit: int
    remaining: int
    reset_seconds: float
    """Until it is full again."""


@dataclass(frozen=True)
class Use:
    """What somebody spent on one day."""

    day: str
    tenant: str | None
    key: str
    field: str
    amount: int


class Meter:
    """Counts requests and tokens of callers, and holds them to their limits. For the tasks of one event loop.

    Tokens are known only once they are spent: a request is let in while its bucket is not empty, and what it then
    costs may leave a debt, which must be filled before the next one is let in. So a limit holds over time, whatever
    the length of answers, and a request larger than the bucket is not refused forever.

    Args:
        ledger: where buckets and sums are; servers of one Redis share them.
        clock: seconds since 1970.
    """

    def __init__(self, ledger: Ledger, keys: Keys, tenants: Tenants, clock: Callable[[], float] = time.time) -> None:
        self._ledger = ledger
        self._keys = keys
        self._tenants = tenants
        self._clock = clock
        self._door = threading.Lock()
        self._unsaved: Counter[tuple[str, str]] = Counter()
        """(month, name of the sum) → amount."""
        self._charging: set[asyncio.Task[None]] = set()

    async def admit(self, caller: Caller) -> list[Level]:
        """Let a request in, and count it. Returns what is left, for the headers of the answer.

        Raises:
            RateLimitError: the caller has spent what it may; nothing is counted.
            StoreError: the ledger failed.
        """
        buckets = self._buckets(caller)
        levels = await asyncio.to_thread(self._take_all, buckets) if buckets else []
        self._count(caller, requests=1)
        return levels

    def charge(self, caller: Caller, *, prompt_tokens: int = 0, completion_tokens: int = 0) -> None:
        """Note what a request has cost. Does not block, and never fails."""
        if not prompt_tokens + completion_tokens:
            return
        self._count(caller, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)
        buckets = [bucket for bucket in self._buckets(caller) if bucket.unit == "tokens" and bucket.rate.capacity]
        if buckets:
            task = asyncio.ensure_future(asyncio.to_thread(self._spend, buckets, prompt_tokens + completion_tokens))
            self._charging.add(task)
            task.add_done_callback(self._charging.discard)

    async def settle(self) -> None:
        """Save what was counted since the last time.

        Raises:
            StoreError: the ledger failed; the next call saves it.
        """
        await asyncio.gather(*self._charging, return_exceptions=True)
        await asyncio.to_thread(self._save)

    def usage(self, month: str) -> Iterator[Use]:
        """What was spent in a month ("2026-11"), by all servers, as far as they have saved it.

        Raises:
            StoreError: the ledger failed.
        """
        for name, amount in sorted(self._ledger.sums(f"usage-{month}").items()):
            day, tenant, key, field = name.split(" ")
            yield Use(day, None if tenant == "-" else tenant, key, field, amount)

    def _buckets(self, caller: Caller) -> list[_Bucket]:
        key, limits = self._keys.get(caller.key), self._tenants.limits(caller.tenant)
        found = []
        for unit in ("tokens", "requests"):
            # The key's comes first: what it refuses is never taken from its tenant's other keys, not for an instant.
            given = [] if key is None else [(f"key-{key.id}", getattr(key, f"{unit}_per_minute"))]
            given.append((f"tenant-{caller.tenant}", getattr(limits, f"{unit}_per_minute")))
            found += [
                _Bucket(f"{name}-{unit}", unit, Rate(limit, limit / 60)) for name, limit in given if limit is not None
            ]
        return found

    def _take_all(self, buckets: Sequence[_Bucket]) -> list[Level]:
        levels: dict[str, Level] = {}
        for i, bucket in enumerate(buckets):
            try:
                level = self._take(bucket, list(levels.values()))
            except SwitchyardError:
                self._give_back(buckets[:i])
                raise
            if bucket.unit not in levels or level.remaining < levels[bucket.unit].remaining:
                levels[bucket.unit] = level
        return list(levels.values())

    def _take(self, bucket: _Bucket, others: list[Level]) -> Level:
        rate = bucket.rate
        # A limit of nothing is never filled: there is no use in coming again soon.
        balance = self._ledger.take(bucket.name, rate, bucket.cost, least=1) if rate.capacity else Balance(False, 0.0)
        if not balance.granted:
            wait = (1 - balance.level) / rate.per_second if rate.per_second else _NEVER_SECONDS
            raise RateLimitError(
                f"the limit of {rate.capacity:g} {bucket.unit} per minute is used up",
                retry_after=max(1, math.ceil(wait)),
                headers=headers([*others, _level(bucket, balance.level)]),
            )
        return _level(bucket, balance.level)

    def _give_back(self, buckets: Sequence[_Bucket]) -> None:
        """What a request was granted that another bucket refuses: a refused one costs nothing."""
        for bucket in buckets:
            if bucket.cost:
                with suppress(StoreError):  # the refusal is what the client must hear of
                    self._ledger.take(bucket.name, bucket.rate, -bucket.cost, least=ANYWAY)

    def _spend(self, buckets: list[_Bucket], tokens: int) -> None:
        for bucket in buckets:
            try:
                self._ledger.take(bucket.name, bucket.rate, tokens, least=ANYWAY)
            except StoreError:  # the answer is given; it must not fail for want of a bill
                continue

    def _count(self, caller: Caller, **amounts: int) -> None:
        day = datetime.fromtimestamp(self._clock(), UTC).strftime("%Y-%m-%d")
        with self._door:
            for field, amount in amounts.items():
                self._unsaved[day[:7], f"{day} {caller.tenant or '-'} {caller.key} {field}"] += amount

    def _save(self) -> None:
        with self._door:
            unsaved, self._unsaved = self._unsaved, Counter()
        for month in sorted({month for month, _ in unsaved}):
            amounts = {name: amount for (of, name), amount in unsaved.items() if of == month and amount}
            try:
                self._ledger.add(f"usage-{month}", amounts)
            except StoreError:
                with self._door:
                    self._unsaved.update(unsaved)
                raise
            unsaved = Counter({key: amount for key, amount in unsaved.items() if key[0] != month})


def headers(levels: list[Level]) -> Mapping[str, str]:
    """OpenAI's headers: what the limits are, what is left, and when all of it is there again."""
    found = {}
    for level in levels:
        found[f"x-ratelimit-limit-{level.unit}"] = str(level.limit)
        found[f"x-ratelimit-remaining-{level.unit}"] = str(level.remaining)
        found[f"x-ratelimit-reset-{level.unit}"] = duration(level.reset_seconds)
    return found


def duration(seconds: float) -> str:
    """As OpenAI writes it: `120ms`, `1.5s`, `6m0s`."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(round(seconds, 1), 60)
    return f"{int(minutes)}m{rest:g}s" if minutes else f"{rest:g}s"


def _level(bucket: _Bucket, level: float) -> Level:
    rate = bucket.rate
    reset = (rate.capacity - level) / rate.per_second if rate.per_second else _NEVER_SECONDS
    return Level(bucket.unit, int(rate.capacity), max(0, int(level)), reset)
