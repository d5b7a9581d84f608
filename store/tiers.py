"""Where an expert's bytes are, and what each of these places keeps count of."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from enum import StrEnum

_log = logging.getLogger(__name__)


class Tier(StrEnum):
    """A place where an expert's bytes can be, the nearest to the model first."""

    DEVICE = "device"
    """Decoded, where the base is."""
    HOST = "host"
    """Decoded, in the machine's memory."""
    CACHE = "cache"
    """Files, on a disk of this machine, of experts that live in Redis."""
    STORE = "store"
    """Files, where all experts live: a folder or Redis."""


@dataclass(frozen=True)
class TierStats:
    """What one tier has done since the start.

    Attributes:
        used_bytes: in it now; None where counting them would take a look at every file.
        limit_bytes: most that may be in it; None where that is not ours to say.
        experts: how many are in it now; None as above.
        hits, misses: look-ups that found an expert there, or did not.
        loads: experts put there. For the store: read from it.
        evictions: experts dropped from it to make room.
        load_seconds: time that the loads took.
        faults: copies whose bytes were not what they had been; none of them was used.
        healed: damaged copies that were made anew from another tier.
    """

    tier: Tier
    used_bytes: int | None = None
    limit_bytes: int | None = None
    experts: int | None = None
    hits: int = 0
    misses: int = 0
    loads: int = 0
    evictions: int = 0
    load_seconds: float = 0.0
    faults: int = 0
    healed: int = 0


class TierMeter:
    """Counts what happens in one tier. Thread-safe."""

    def __init__(self, tier: Tier) -> None:
        self.tier = tier
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(("hits", "misses", "loads", "evictions", "faults", "healed"), 0)
        self._load_seconds = 0.0

    def looked_up(self, *, found: bool) -> None:
        """Count a look-up."""
        self._count("hits" if found else "misses")

    def loaded(self, seconds: float) -> None:
        """Count an expert that was put there, and how long that took."""
        with self._lock:
            self._counts["loads"] += 1
            self._load_seconds += seconds

    def evicted(self) -> None:
        """Count an expert that was dropped to make room."""
        self._count("evictions")

    def damaged(self, digest: str) -> None:
        """Count and log a copy whose bytes are not what they were."""
        _log.error("integrity: the copy of %s… in the tier `%s` is damaged; it is not used", digest[:12], self.tier)
        self._count("faults")

    def healed(self, digest: str, source: Tier) -> None:
        """Count and log a damaged copy that was made anew."""
        _log.warning(
            "integrity: the copy of %s… in the tier `%s` was made anew from the tier `%s`",
            digest[:12], self.tier, source,
        )  # fmt: skip
        self._count("healed")

    def stats(
        self, *, used_bytes: int | None = None, limit_bytes: int | None = None, experts: int | None = None
    ) -> TierStats:
        """All counts at this instant, beside what the tier holds."""
        with self._lock:
            return TierStats(
                self.tier, used_bytes, limit_bytes, experts, load_seconds=self._load_seconds, **self._counts
            )

    def _count(self, what: str) -> None:
        with self._lock:
            self._counts[what] += 1
