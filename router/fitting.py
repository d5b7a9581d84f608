"""The metric of a set of experts, fitted as the settings say."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Sequence

from router.discriminant import Discriminant
from router.flex import flex_metric
from router.index import Entry, distinct
from router.metric import Metric, MetricKind, Standardised
from router.profile import Profile
from router.settings import RouterSettings

_QUICK_SECONDS = 0.3


class Fitting:
    """Fits metrics, in whatever thread it is called."""

    def __init__(self, settings: RouterSettings) -> None:
        self._settings = settings
        self._seconds = 0.0

    def is_quick(self, entries: Sequence[Entry]) -> bool:
        """Whether prompts should wait for the metric of a changed library, as far as the last fit tells: one that was
        fitted without an expert does not tell it apart where there are few. It depends on how wide the base is."""
        return len(entries) <= self._settings.rank and self._seconds < _QUICK_SECONDS

    def metric(self, entries: Sequence[Entry], background: Entry | None) -> Metric:
        """Fitted to experts, at least one, and to what is no expert's."""
        began = time.monotonic()
        try:
            return self._fit([entry.profile for entry in distinct(entries)], background)
        finally:
            self._seconds = time.monotonic() - began

    def _fit(self, profiles: list[Profile], background: Entry | None) -> Metric:
        given = self._settings
        if background is None:
            known = [profile.variance for profile in profiles if profile.is_calibrated]
            return Standardised.fit(known or [profiles[0].variance])
        profiles.append(background.profile)
        if given.metric is MetricKind.FLEX:
            return flex_metric(profiles, rank=given.rank, neighbours=given.neighbours, epochs=given.epochs)
        return Discriminant.fit(profiles, given.rank, parts=given.background_parts)


def library_key(entries: Iterable[Entry]) -> str:
    """Identifies a set of experts by their exemplars; names do not matter."""
    keys = sorted({f"{entry.digest}\0{entry.key}" for entry in entries})
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()
