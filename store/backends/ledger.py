"""What servers of one store share besides experts: small documents (API keys, tenants), sums, and token buckets."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Rate:
    """A token bucket: holds at most `capacity`, fills by `per_second`."""

    capacity: float
    per_second: float


@dataclass(frozen=True)
class Balance:
    """What became of taking from a bucket: whether it was granted, and what is in it now. A debt is negative."""

    granted: bool
    level: float


class Ledger(Protocol):
    """Thread-safe; shared by all servers of a store. What a call has acknowledged survives the process.

    Every method raises StoreError where the medium fails, and StoreUnavailableError where it does not answer.
    """

    def edition(self) -> int:
        """A number that is another one once documents have changed, whoever changed them. Takes microseconds."""
        ...

    def documents(self, kind: str) -> Mapping[str, bytes]:
        """All documents of a kind by name."""
        ...

    def put(self, kind: str, name: str, data: bytes, *, absent: bool = False) -> bool:
        """Set a document. With `absent`, only if there is none of that name; False, and nothing changed, if so."""
        ...

    def delete(self, kind: str, name: str) -> bool:
        """Remove a document; False if there was none."""
        ...

    def add(self, kind: str, amounts: Mapping[str, int]) -> None:
        """Add to the sums of a kind, all or none."""
        ...

    def sums(self, kind: str) -> Mapping[str, int]:
        """The sums of a kind."""
        ...

    def take(self, bucket: str, rate: Rate, cost: float, *, least: float) -> Balance:
        """Take from a bucket if it holds at least `least`; what is taken may leave it in debt.

        A bucket that nobody has taken from is full.
        """
        ...

    def close(self) -> None:
        """Let go of everything; the ledger is not used afterwards."""
        ...


def fill(level: float, rate: Rate, seconds: float) -> float:
    """What a bucket holds after some time."""
    return min(rate.capacity, level + max(0.0, seconds) * rate.per_second)


class LocalBuckets:
    """Token buckets of this process. Not thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, tuple[float, float, Rate]] = {}
        """Bucket → level, when that was, and how it fills."""

    def take(self, bucket: str, rate: Rate, cost: float, *, least: float) -> Balance:
        """See `Ledger.take`."""
        now = self._clock()
        level, then, _ = self._buckets.get(bucket, (rate.capacity, now, rate))
        level = fill(level, rate, now - then)
        granted = level >= least
        self._buckets[bucket] = level - cost if granted else level, now, rate
        if len(self._buckets) > 4096:
            self._forget_full(now)
        return Balance(granted, self._buckets[bucket][0] if bucket in self._buckets else rate.capacity)

    def _forget_full(self, now: float) -> None:
        """A full bucket is as good as none."""
        self._buckets = {
            name: (level, then, rate)
            for name, (level, then, rate) in self._buckets.items()
            if fill(level, rate, now - then) < rate.capacity
        }
