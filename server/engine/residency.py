"""Which experts are decoded in device memory: bounded in bytes, pinned while in use, least recently used first out."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from server.engine.expert import DecodedExpert, ExpertSource
from store.errors import ExpertUnavailableError, SwitchyardError
from store.mix import Mix
from store.tiers import Tier, TierMeter, TierStats

log = logging.getLogger(__name__)

Result = TypeVar("Result")
STARVING = 3.0
"""Seconds after which a mix that waits for room has experts in use drained for it."""

Ready = Callable[[SwitchyardError | None], None]
Then = Callable[[str, Future[Result]], None]


@dataclass(eq=False)
class Ticket:
    """A mix that waits for its experts."""

    mix: Mix
    ready: Ready
    since: float
    missing: set[str] = field(default_factory=set)

    @property
    def digests(self) -> set[str]:
        return {digest for digest, _ in self.mix.parts}


@dataclass
class _Slot:
    """An expert that is resident or has its bytes reserved while it is being decoded."""

    nbytes: int
    pins: int = 0
    expert: DecodedExpert | None = None
    doomed: bool = False
    waiters: list[Ticket] = field(default_factory=list)


class Residency:
    """Grants mixes: `ready(None)` is called with every expert of the mix resident and pinned.

    All methods run on the engine's thread. Loads run on one thread of their own and come back through `post`, so
    running streams never wait for them. A mix reserves the room for all its experts at once: two mixes that each hold
    half of the memory while waiting for the other half cannot happen. Mixes whose experts are all resident pass by
    those that wait for room. So that popular experts cannot keep a rare one out for ever, a mix that has waited for
    `STARVING` seconds has as many experts as it needs drained: nobody else may begin to use them before its turn.
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
        self._post = post
        self._slots: OrderedDict[str, _Slot] = OrderedDict()
        self._experts: dict[str, DecodedExpert] = {}
        self._sizes: dict[str, int] = {}
        self._measuring: dict[str, Future[int]] = {}
        self._queue: deque[Ticket] = deque()
        self._draining: set[str] = set()
        self._drained_for: Ticket | None = None
        self._pumping = False
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="expert-loader")
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
        now = self._clock()
        return {ticket.mix: now - ticket.since for ticket in reversed([*self._queue])}

    def stats(self) -> TierStats:
        """What is on the device, and what has been going on there."""
        return self.meter.stats(used_bytes=self.used_bytes, limit_bytes=self.budget_bytes, experts=len(self._experts))

    def request(self, mix: Mix, ready: Ready) -> Ticket:
        """Call `ready(None)` once all experts of `mix` are pinned (perhaps before this returns), or
        `ready(error)` if that cannot be. The ticket is for `cancel`."""
        for digest, _ in mix.parts:
            self.meter.looked_up(found=digest in self._experts)
        ticket = Ticket(mix, ready, self._clock())
        if self._at_hand(mix):
            self._pin(mix)
            ready(None)
        else:
            self._queue.append(ticket)
            self._pump()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Forget a request that waits for its turn. Whose experts are being loaded gets them all the same."""
        if ticket not in self._queue:
            return
        self._queue.remove(ticket)
        for digest in ticket.digests & self._measuring.keys():
            if not any(digest in other.digests for other in self._queue):
                self._measuring[digest].cancel()
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
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _at_hand(self, mix: Mix) -> bool:
        """Whether all its experts are resident, and none is drained for somebody else."""
        return all(digest in self._experts and digest not in self._draining for digest, _ in mix.parts)

    def _pin(self, mix: Mix) -> None:
        for digest, _ in mix.parts:
            slot = self._slots[digest]
            slot.pins += 1
            slot.doomed = False
            self._slots.move_to_end(digest)

    def _pump(self) -> None:
        """Start what fits, in order of arrival, and whatever needs no room."""
        if self._pumping:
            return  # whoever is granted may release at once, as those do who have gone: the loop below goes on anyway
        self._pumping = True
        try:
            while self._grant_next():
                pass
        finally:
            self._pumping = False

    def _grant_next(self) -> bool:
        first = self._queue[0] if self._queue else None
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
        absent = ticket.digests - self._slots.keys()
        if not absent <= self._sizes.keys():
            return
        missing = sum(self._sizes[digest] for digest in absent) - (self.budget_bytes - self.used_bytes)
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
        unmeasured = [digest for digest in absent if digest not in self._sizes]
        for digest in unmeasured:
            if digest not in self._measuring:
                self._measuring[digest] = self._submit(self._source.decoded_bytes, digest, self._measured)
        if unmeasured:
            return False
        needed = sum(self._sizes[digest] for digest in absent)
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
            self._slots[digest] = _Slot(self._sizes[digest])
            self.used_bytes += self._sizes[digest]
            self._submit(self._source.load, digest, partial(self._loaded, time.perf_counter()))
        self._pin(ticket.mix)
        ticket.missing = {digest for digest in wanted if self._slots[digest].expert is None}
        for digest in ticket.missing:
            self._slots[digest].waiters.append(ticket)
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

    def _submit(self, call: Callable[[str], Result], digest: str, then: Then[Result]) -> Future[Result]:
        future = self._pool.submit(call, digest)
        future.add_done_callback(lambda done: self._post(lambda: then(digest, done)))
        return future

    def _measured(self, digest: str, done: Future[int]) -> None:
        del self._measuring[digest]
        error = None if done.cancelled() else done.exception()
        if error is not None:
            refused = _unavailable(digest, error)
            for ticket in [t for t in self._queue if digest in t.digests]:
                self._queue.remove(ticket)
                ticket.ready(refused)
        elif not done.cancelled():
            self._sizes[digest] = done.result()
        self._pump()  # where it was cancelled, too: somebody may have come for it meanwhile

    def _loaded(self, started: float, digest: str, done: Future[DecodedExpert]) -> None:
        slot = self._slots[digest]
        waiters, slot.waiters = slot.waiters, []
        error = done.exception()
        if error is None:
            slot.expert = self._experts[digest] = done.result()
            self.meter.loaded(time.perf_counter() - started)
            self._pool.submit(self._source.keep, digest)
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
