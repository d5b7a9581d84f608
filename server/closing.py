"""The end of the time that a server which was told to stop gives to what it is at."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from store.errors import ClosingError


class Closing:
    """Ends what is still at work when the time is over, all of it at once. For one event loop."""

    def __init__(self) -> None:
        self._over = False
        self._limits: set[asyncio.Timeout] = set()

    @property
    def at_work(self) -> int:
        """How much would end now."""
        return len(self._limits)

    def end(self) -> None:
        """Have everything that is bound end, and whatever will be."""
        if self._over:
            return
        self._over = True
        now = asyncio.get_running_loop().time()
        for limit in self._limits:
            limit.reschedule(now)

    @asynccontextmanager
    async def bound(self) -> AsyncIterator[Bound]:
        """Cancel what is within, once the time is over.

        Raises:
            ClosingError: it was.
        """
        refusal = ClosingError("the server is shutting down; ask again, or another one")
        if self._over:
            raise refusal
        limit = asyncio.timeout(None)
        try:
            async with limit:
                self._limits.add(limit)
                try:
                    yield Bound(limit, self._limits)
                finally:
                    self._limits.discard(limit)
        except TimeoutError:
            if not limit.expired():  # somebody else's
                raise
            raise refusal from None


class Bound:
    """What ends with the server's time, unless it is released before."""

    def __init__(self, limit: asyncio.Timeout, limits: set[asyncio.Timeout]) -> None:
        self._limit = limit
        self._limits = limits

    async def release(self) -> None:
        """Let it go on whatever happens; if it is being ended already, it ends here."""
        if self._limit.expired():
            await asyncio.sleep(0)
        self._limits.discard(self._limit)
        self._limit.reschedule(None)
