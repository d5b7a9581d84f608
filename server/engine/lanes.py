"""Whose turn it is: requests that share a mix form a lane, and lanes share steps or take turns."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from server.engine.fairness import LONGEST_WAIT, ServiceCounters
from server.engine.sequence import Sequence
from store.mix import Mix


@dataclass(eq=False)
class Lane:
    """All sequences of one mix."""

    mix: Mix
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        return not self.waiting and not self.running

    def tenants(self) -> set[str | None]:
        return {one.request.tenant for one in (*self.running, *self.waiting)}


class Turns:
    """Gives steps to lanes. A turn belongs to one lane, or to all that can share steps; after `turn_steps` steps, or
    once its lanes have gone, the next one begins.

    Attributes:
        lanes: every lane by mix, the one whose turn it is in front, those that ran last at the back.
        owed: who waits for room that the lanes of this turn hold: nobody who comes after it begins before it.
    """

    def __init__(self, turn_steps: int, shareable: Callable[[Mix], bool], service: ServiceCounters) -> None:
        self._turn_steps = turn_steps
        self._shareable = shareable
        self._service = service
        self._alone: Mix | None = None
        """Whose turn it is, if not that of all lanes that share steps."""
        self._steps = self._turns = 0
        self.lanes: OrderedDict[Mix, Lane] = OrderedDict()
        self.owed: Sequence | None = None

    def step(self, *, mixed: bool) -> list[Lane]:
        """The lanes that run in the next step; there must be one."""
        present = self._present(mixed)
        if present and self._steps < self._turn_steps and (self.owed is None or any(lane.running for lane in present)):
            self._steps += 1
            return present
        for lane in present:
            self.lanes.move_to_end(lane.mix)
        return self._begin(self._next(present), mixed)

    def give(self, lane: Lane, owed: Sequence | None, *, mixed: bool) -> list[Lane]:
        """End the present turn for that of a lane, which has room that `owed` waits for; the lanes that run in it."""
        for other in self._present(mixed):
            self.lanes.move_to_end(other.mix)
        return self._begin(lane, mixed, owed)

    def served(self, lane: Lane) -> int:
        """The service of the tenant in a lane that got least."""
        return min(self._service.served(tenant) for tenant in lane.tenants())

    def _begin(self, lane: Lane, mixed: bool, owed: Sequence | None = None) -> list[Lane]:
        self.lanes.move_to_end(lane.mix, last=False)
        shared = mixed and self._shareable(lane.mix)
        self._alone, self._steps, self.owed = None if shared else lane.mix, 1, owed
        return self._sharing(mixed) if shared else [lane]

    def _next(self, ran: list[Lane]) -> Lane:
        """Whose turn is next: the lane's with the tenant served least; of several, the one that waited longest.

        But a tenant that has streams in the turn that ends is served in it as well, and may then never be the one that
        was served least. So its other lanes come next, unless who waits to begin in such a turn was served less.
        """
        lanes = list(self.lanes.values())
        self._turns = (self._turns + 1) % LONGEST_WAIT
        if not self._turns:
            return lanes[0]
        if ran:
            served = self._service.served
            least = min(self.served(lane) for lane in ran)
            patient = min((served(one.request.tenant) for lane in ran for one in lane.waiting), default=math.inf)
            bounds = {one.request.tenant: patient for lane in ran for one in lane.running}
            had = set(ran)
            lanes = [
                lane
                for lane in lanes
                if lane not in had and any(served(tenant) <= bounds.get(tenant, least) for tenant in lane.tenants())
            ] or lanes
        return min(lanes, key=self.served)

    def _present(self, mixed: bool) -> list[Lane]:
        """The lanes whose turn it is, as far as there are any."""
        if self._alone is None:
            return self._sharing(mixed)
        lane = self.lanes.get(self._alone)
        if lane is None:
            return []
        return self._sharing(mixed) if mixed and self._shareable(lane.mix) else [lane]

    def _sharing(self, mixed: bool) -> list[Lane]:
        return [lane for lane in self.lanes.values() if mixed and self._shareable(lane.mix)]
