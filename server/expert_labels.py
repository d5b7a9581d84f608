"""Which experts have time series of their own: a server of thousands must not have thousands of each."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from prometheus_client.metrics import MetricWrapperBase

OTHER = "other"
"""The label that all others share. A series never falls: what was counted here stays here."""


class ExpertLabels:
    """The labels in use: of the experts that came first, until one of them has been idle for so long.

    Args:
        most: experts with a label of their own.
        idle_seconds: after which an expert gives its label up to another one that needs it.
        forget: told a label that is given up: its series must go.
    """

    def __init__(self, most: int, idle_seconds: float, forget: Callable[[str], None]) -> None:
        self._most = most
        self._idle_seconds = idle_seconds
        self._forget = forget
        self._used: dict[str, float] = {}
        """When each was last used; the idlest first."""

    def of(self, name: str) -> str:
        """The label of an expert that is used now."""
        now = time.monotonic()
        if name not in self._used and len(self._used) >= self._most:
            idlest = next(iter(self._used))
            if now - self._used[idlest] <= self._idle_seconds:
                return OTHER
            del self._used[idlest]
            self._forget(idlest)
        self._used.pop(name, None)
        self._used[name] = now
        return name


def drop(metric: MetricWrapperBase, *labels: str) -> None:
    """Remove a series, if it is there."""
    with suppress(KeyError):
        metric.remove(*labels)
