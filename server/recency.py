"""When experts were last asked for, since this server started."""

from __future__ import annotations

import time
from collections.abc import Callable

REMEMBERED = 100_000
"""Most experts whose last use is kept; the idlest are forgotten first."""


class Recency:
    """For one event loop.

    Args:
        clock: Unix seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.time, most: int = REMEMBERED) -> None:
        self._clock = clock
        self._most = most
        self._last: dict[str, int] = {}
        """By digest; the idlest first."""

    def note(self, digest: str) -> None:
        """The expert takes part in an answer now."""
        self._last.pop(digest, None)
        self._last[digest] = int(self._clock())
        if len(self._last) > self._most:
            del self._last[next(iter(self._last))]

    def last(self, digest: str) -> int | None:
        """Unix seconds; None if it was not asked for, as far as is known here."""
        return self._last.get(digest)
