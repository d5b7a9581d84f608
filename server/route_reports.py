"""Where the prompts routed last lie, and reports of how well experts are told apart."""

from __future__ import annotations

import asyncio
from collections import deque

from router.decision import Decision
from router.options import ANY
from router.report import Report, Seen
from router.router import Router
from store.access import Caller
from store.registry import Registry

REMEMBERED = 512
"""Prompts routed last whose features are kept, in memory only, without their text."""


class RouteReports:
    """Reports of routing, to each caller of what it may see. One is made at a time: each takes a core for seconds."""

    def __init__(self, registry: Registry, router: Router) -> None:
        self._registry = registry
        self._router = router
        self._recent: deque[tuple[str | None, Seen]] = deque(maxlen=REMEMBERED)
        self._turn = asyncio.Lock()

    def note(self, decision: Decision, by: Caller) -> None:
        """Remember where a routed prompt lies, and whose it was."""
        if decision.features is not None:
            digest = decision.parts[0][1] if decision.parts else None
            self._recent.append((by.tenant, Seen(decision.features, digest)))

    async def make(self, most: int, by: Caller) -> Report:
        """A report of at most so many experts, of those that exist for the caller, with the prompts of its tenant; an
        administrator sees all."""
        visible = await asyncio.to_thread(self._registry.names, by)
        seen = [one for tenant, one in self._recent if by.is_admin or tenant == by.tenant]
        async with self._turn:
            return await self._router.report(seen, ANY if by.is_admin else ANY.within(visible), most)
