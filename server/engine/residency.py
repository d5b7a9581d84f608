"""Which experts are decoded in device memory: bounded in bytes, pinned while in use, least recently used first out."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from server.engine.expert import DecodedExpert, ExpertSource
from server.engine.fairness import Tenant
from server.engine.fetching import Ahead
from server.engine.load_thread import Errand, Job, LoadThread
from server.engine.looks import Looks
from server.engine.tickets import Ready, Ticket, Tickets
from store.errors import ExpertUnavailableError, SwitchyardError
from store.mix import Mix
from store.tiers import Tier, TierMeter, TierStats

__all__ = ["Residency", "Ticket"]

log = logging.getLogger(__name__)

STARVING = 3.0
"""Seconds after which a mix that waits for room has experts in use drained for it, and what was read for it is not kept
any longer."""


@dataclass
class _Slot:
    """An expert that is resident or has its bytes reserved while it is being decoded."""

    nbytes: int
    pins: int = 0
    expert: DecodedExpert | None = None
    doomed: bool = False
    load: Job[DecodedExpert] | None = None
    waiters: list[Ticket] = field(default_factory=list)


class Residency:
    """Grants mixes: `ready(None)` is called with every expert of the mix resident and pinned.

    All methods run on the engine's thread. Loads run on one thread of their own and come back through `post`, so
    running streams never wait for them. Tenants have mixes granted, and experts loaded, in turn; one tenant's go in
    order of arrival. A mix reserves the room for all its experts at once: two mixes that each hold half of the memory
    while waiting for the other half cannot happen. Mixes whose experts are all resident pass by those that wait for
    room; the experts of the others come to host memory meanwhile. So that popular experts cannot keep a rare one out
    for ever, a mix that has waited for `STARVING` seconds has as many experts as it needs drained: nobody else may
    begin to use them before its turn.
    """

    def __init__(
        self,
        source: ExpertSource,
        budget_bytes: int,
        post: Callable[[Callable[[], None]], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args:
        post: runs a function on the engine's thread, soon.
        """
        self._clock = clock
        self._source = source
        self._slots: OrderedDict[str, _Slot] = OrderedDict()
        self._experts: dict[str, DecodedExpert] = {}
        self._queue = Tickets()
        self._draining: set[str] = set()
        self._drained_for: Ticket | None = None
        self._pumping = False
        self._thread = LoadThread(post)
        self._looks = Looks(source, self._thread, clock, keep_seconds=STARVING)
        self._ahead = Ahead(source, self._thread, self._pump)
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self.meter = TierMeter(Tier.DEVICE)

    @property
    def experts(self) -> Mapping[str, DecodedExpert]:
        """Every resident expert by digest; always the same object."""
        return self._experts

    def pins(self) -> Mapping[str, tuple[int, int, bool]]:
        """Digest → bytes, how many requests use it, and whether it is decoded yet."""
        return {digest: (slot.nbytes, slot.pins, slot.expert is not None) for digest, slot in [*self._slots.items()]}

    def waiting(self) -> Mapping[Mix, float]:
        """Mixes that wait for room or a load, each with the seconds that the first of it has waited."""
        return self._queue.seconds(self._clock())

    def stats(self) -> TierStats:
        """What is on the device, and what has been going on there."""
        return self.meter.stats(used_bytes=self.used_bytes, limit_bytes=self.budget_bytes, experts=len(self._experts))

    def request(self, mix: Mix, ready: Ready, tenant: Tenant = None) -> Ticket:
        """Call `ready(None)` once all experts of `mix` are pinned (perhaps before this returns), or
        `ready(error)` if that cannot be. The ticket is for `cancel`."""
        for digest, _ in mix.parts:
            self.meter.looked_up(found=digest in self._experts)
        ticket = Ticket(mix, ready, self._clock(), tenant)
        if self._at_hand(mix):
            self._pin(mix)
            ready(None)
        else:
            self._queue.add(ticket)
            self._pump()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Forget a request that waits for its turn. Whose experts are being loaded gets them all the same."""
        if ticket not in self._queue:
            return
        self._queue.remove(ticket)
        for digest in ticket.digests.intersection(self._looks.under_way):
            if not self._queue.wanting(digest):
                self._looks.call_off(digest)
        self._pump()

    def release(self, mix: Mix) -> None:
        """Undo one granted `request`."""
        for digest, _ in mix.parts:
            self._slots[digest].pins -= 1
            self._evict_if_doomed(digest)
        self._pump()

    def drop(self, digest: str) -> None:
        """Forget an expert as soon as nothing uses it."""
        slot = self._slots.get(digest)
        if slot is None:
            self._source.drop(digest)
            return
        slot.doomed = True
        self._evict_if_doomed(digest)

    def close(self) -> None:
        self._thread.close()

    def _at_hand(self, mix: Mix) -> bool:
        """Whether all its experts are resident, and none is drained for somebody else."""
        return all(digest in self._experts and digest not in self._draining for digest, _ in mix.parts)

    def _is_loading(self, digest: str) -> bool:
        slot = self._slots.get(digest)
        return slot is not None and slot.expert is None

    def _pin(self, mix: Mix) -> None:
        for digest, _ in mix.parts:
            slot = self._slots[digest]
            slot.pins += 1
            slot.doomed = False
            self._slots.move_to_end(digest)

    def _pump(self) -> None:
        """Start what fits, in order of turns, and whatever needs no room."""
        if self._pumping:
            return  # whoever is granted may release at once, as those do who have gone: the loop below goes on anyway
        self._pumping = True
        try:
            while self._grant_next():
                pass
            self._prepare()
        finally:
            self._pumping = False

    def _prepare(self) -> None:
        """See to it that whoever waits will not wait for long once there is room."""
        first = self._queue.first
        self._looks.let_go(self._is_loading, first.digests if first is not None else ())
        if first is None or first.digests.isdisjoint(self._looks.under_way):  # it waits for room
            waiting = [digest for ticket in self._queue for digest, _ in ticket.mix.parts if digest not in self._slots]
            self._ahead.go_on(waiting, self._slots.keys())

    def _grant_next(self) -> bool:
        first = self._queue.first
        if first is not self._drained_for:
            self._draining, self._drained_for = set(), None
        if first is None or self._grant(first):
            return first is not None
        if self._drained_for is None and self._clock() - first.since >= STARVING:
            self._drain_for(first)
        passing = next((ticket for ticket in self._queue if self._at_hand(ticket.mix)), None)
        return passing is not None and self._grant(passing)

    def _drain_for(self, ticket: Ticket) -> None:
        """Choose experts whose bytes, once their users have ended, make room: those with the fewest users first. How
        many it takes can be said once all sizes are known."""
        absent, sizes = ticket.digests - self._slots.keys(), self._looks.sizes
        if not absent <= sizes.keys():
            return
        missing = sum(sizes[digest] for digest in absent) - (self.budget_bytes - self.used_bytes)
        others = [digest for digest in self._slots if digest not in ticket.digests]
        for digest in sorted(others, key=lambda digest: self._slots[digest].pins):
            if missing <= 0:
                break
            self._draining.add(digest)
            missing -= self._slots[digest].nbytes
        self._drained_for = ticket

    def _grant(self, ticket: Ticket) -> bool:
        """Reserve and load what `ticket` misses; False if it must wait for sizes or for room."""
        absent = [digest for digest, _ in ticket.mix.parts if digest not in self._slots]
        sizes = self._looks.sizes
        unmeasured = [digest for digest in absent if digest not in sizes]
        for digest in unmeasured:
            self._looks.begin(digest, ticket.tenant, self._measured)
        if unmeasured:
            return False
        needed = sum(sizes[digest] for digest in absent)
        wanted = ticket.digests
        own = sum(self._slots[digest].nbytes for digest in wanted if digest in self._slots)
        if needed + own > self.budget_bytes:
            message = f"this mix needs {needed + own} bytes of expert memory; expert_bytes allows {self.budget_bytes}"
            self._queue.remove(ticket)
            ticket.ready(ExpertUnavailableError(message, param="experts"))
            return True
        idle = [d for d, slot in self._slots.items() if slot.pins == 0 and slot.expert and d not in wanted]
        spare = sum(self._slots[digest].nbytes for digest in idle)
        if self.used_bytes + needed - spare <= self.budget_bytes:
            for digest in absent:
                self._source.claim(digest)
        for digest in idle:
            if self.used_bytes + needed <= self.budget_bytes:
                break
            self._source.evicted(self._free(digest))
            self.meter.evicted()
        if self.used_bytes + needed > self.budget_bytes:
            return False
        self._queue.remove(ticket)
        for digest in absent:
            slot = self._slots[digest] = _Slot(sizes[digest])
            self.used_bytes += slot.nbytes
            loaded = partial(self._loaded, time.perf_counter(), ticket.tenant)
            slot.load = self._thread.submit(self._source.load, Errand.LOAD, digest, ticket.tenant, loaded)
        self._pin(ticket.mix)
        ticket.missing = {digest for digest in wanted if self._slots[digest].expert is None}
        for digest in ticket.missing:
            slot = self._slots[digest]
            slot.waiters.append(ticket)
            if slot.load is not None and digest not in absent:
                self._thread.share(slot.load, ticket.tenant)
        if not ticket.missing:
            ticket.ready(None)
        return True

    def _free(self, digest: str) -> DecodedExpert:
        self.used_bytes -= self._slots.pop(digest).nbytes
        return self._experts.pop(digest)

    def _evict_if_doomed(self, digest: str) -> None:
        slot = self._slots.get(digest)
        if slot is not None and slot.doomed and slot.pins == 0 and slot.expert is not None:
            self._free(digest)
            self._source.drop(digest)

    def _measured(self, digest: str, error: BaseException | None) -> None:
        if error is not None:
            refused = _unavailable(digest, error)
            for ticket in self._queue.wanting(digest):
                self._queue.remove(ticket)
                ticket.ready(refused)
        self._pump()  # where it was called off, too: somebody may have come for it meanwhile

    def _loaded(self, started: float, tenant: Tenant, digest: str, done: Future[DecodedExpert]) -> None:
        slot = self._slots[digest]
        waiters, slot.waiters, slot.load = slot.waiters, [], None
        error = done.exception()
        if error is None:
            slot.expert = self._experts[digest] = done.result()
            self.used_bytes += slot.expert.nbytes - slot.nbytes  # at most so many had been announced
            slot.nbytes = self._looks.sizes[digest] = slot.expert.nbytes
            self.meter.loaded(time.perf_counter() - started)
            self._thread.submit(self._source.keep, Errand.KEEP, digest, tenant)
            for ticket in waiters:
                ticket.missing.discard(digest)
                if not ticket.missing:
                    ticket.ready(None)
            self._evict_if_doomed(digest)
        else:
            refused = _unavailable(digest, error)
            for ticket in waiters:
                for other in ticket.missing - {digest}:
                    self._slots[other].waiters.remove(ticket)
                for part, _ in ticket.mix.parts:
                    self._slots[part].pins -= 1
                    self._evict_if_doomed(part)
            self.used_bytes -= self._slots.pop(digest).nbytes
            for ticket in waiters:
                ticket.ready(refused)
        self._pump()


def _unavailable(digest: str, error: BaseException) -> SwitchyardError:
    if isinstance(error, SwitchyardError):
        return error
    log.error("loading expert %s failed", digest[:12], exc_info=error)
    return ExpertUnavailableError(f"expert {digest[:12]} could not be loaded", param="model")
