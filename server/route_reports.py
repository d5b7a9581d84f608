"""The prompts routed last: where they lie and what was decided, on a map, and how well experts are told apart."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter, deque
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import numpy as np

from router.decision import Decision
from router.features import Features
from router.map import Map, Points, draw_map
from router.options import ANY, RouteOptions
from router.report import Report, Seen
from router.router import Router
from store.access import Caller
from store.errors import QueueFullError
from store.registry import Registry

REMEMBERED = 512
"""Prompts routed last that are kept, in memory only, without their text."""
_AT_ONCE = 2
"""Reports that a tenant may wait for: so others have theirs after a few turns, however many it asks for."""


@dataclass(frozen=True, eq=False)
class Routed:
    """A prompt that was routed.

    Attributes:
        number: counts up.
        at: Unix seconds.
        tenant: whose it was.
        by_admin: whether experts were looked for that are not the tenant's to see.
        features: `[e]`.
    """

    number: int
    at: float
    tenant: str | None
    by_admin: bool
    decision: Decision
    features: Features

    @property
    def first(self) -> str | None:
        """Digest of the first expert that it was routed to; None is the base."""
        return self.decision.parts[0][1] if self.decision.parts else None


@dataclass(frozen=True, eq=False)
class LiveMap:
    """A map with the prompts on it, the oldest first; `places` is `[n, 2]`."""

    map: Map
    routed: tuple[Routed, ...]
    places: Points


class RouteReports:
    """Maps and reports of routing, to each caller of what it may see: prompts of its tenant, but for those for which an
    administrator's eyes were used, and those whose decision tells of an expert that does not exist for it any more."""

    def __init__(self, registry: Registry, router: Router) -> None:
        self._registry = registry
        self._router = router
        self._recent: deque[Routed] = deque(maxlen=REMEMBERED)
        # Not from 0: a page that stays open must see that a server has started anew, and whose numbers are whose.
        self._numbers = itertools.count(time.time_ns() // 1_000_000)
        self._turn = asyncio.Lock()
        self._waiting: Counter[str | None] = Counter()
        """Reports that are asked for, by tenant."""

    def note(self, decision: Decision, by: Caller) -> None:
        """Remember where a routed prompt lies, and whose it was."""
        if decision.features is not None:
            features = decision.features
            routed = Routed(next(self._numbers), time.time(), by.tenant, by.is_admin, decision, features)
            self._recent.append(routed)

    async def make(self, most: int, by: Caller) -> Report:
        """A report of at most so many experts, of those that exist for the caller, with the prompts of its tenant; an
        administrator sees all. One is made at a time: each takes a core for seconds.

        Raises:
            QueueFullError: the caller's tenant waits for enough of them.
        """
        if self._waiting[by.tenant] >= _AT_ONCE:
            raise QueueFullError("reports are being made already, one at a time; try again soon", retry_after=5)
        self._waiting[by.tenant] += 1
        try:
            options, recent = await self._seen_by(by)
            async with self._turn:
                seen = [Seen(one.features, one.first) for one in recent]
                return await _to_its_end(self._router.report(seen, options, most))
        finally:
            self._waiting[by.tenant] -= 1

    async def map(self, most: int, by: Caller, *, after: int = 0) -> LiveMap:
        """A map of the same, with the prompts whose number is above `after`: cheap enough to be followed."""
        options, recent = await self._seen_by(by)
        snapshot = await self._router.current()
        traffic = Counter(one.first for one in recent)

        def draw() -> LiveMap:
            drawn = draw_map(snapshot, traffic, options, most)
            new = tuple(one for one in recent if one.number > after)
            if not new:
                return LiveMap(drawn, (), np.empty((0, 2)))
            return LiveMap(drawn, new, drawn.projection.place(np.stack([one.features for one in new])))

        return await asyncio.to_thread(draw)

    async def _seen_by(self, by: Caller) -> tuple[RouteOptions, list[Routed]]:
        if by.is_admin:
            return ANY, list(self._recent)
        visible = await asyncio.to_thread(self._registry.names, by)
        recent = [
            one
            for one in self._recent
            if one.tenant == by.tenant and not one.by_admin and named_in(one.decision) <= visible
        ]
        return ANY.within(visible), recent


async def _to_its_end(work: Coroutine[Any, Any, Report]) -> Report:
    """What some work in a thread gives. Cancelled, this ends with the work all the same, which a thread goes on with:
    until then, nobody else's may begin."""
    working = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(working)
    finally:
        await asyncio.wait((working,))


def named_in(decision: Decision) -> frozenset[str]:
    """The experts that a decision tells of: those who may see it may see all of them, or it tells too much."""
    neighbours = (near.name for near in decision.neighbours if not near.is_background)
    return frozenset(neighbours) | {name for name, _, _ in decision.parts}
