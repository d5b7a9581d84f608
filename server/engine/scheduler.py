"""Who runs in the next step.

Requests that share a mix form a lane. In mixed mode all lanes share every step; in merged mode one lane runs at a
time and lanes take turns (`server.engine.lanes`). Sequences join and leave at every step. Where tenants compete for
room or turns, the one that has been served least comes first (`server.engine.fairness`); among one tenant's, who has
waited longest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch

from server.engine.batch import Batch, Work
from server.engine.fairness import LONGEST_WAIT, ServiceCounters
from server.engine.kv_cache import KVCache
from server.engine.lanes import Lane, Turns
from server.engine.prefill_budget import PrefillBudget
from server.engine.sequence import Sequence, SequenceState
from store.mix import Mix

__all__ = ["Batch", "Demand", "Lane", "Scheduler", "Work"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Demand:
    """What a lane would put into the next steps, at most `steps`: `rows` tokens of `mix` into the first, then one for
    each of its `streams`."""

    mix: Mix
    rows: int
    steps: int
    streams: int


class Scheduler:
    """Chooses lanes and fills steps; owns the sequences between their arrival and their end."""

    def __init__(
        self,
        cache: KVCache,
        *,
        max_batch: int,
        step_tokens: int,
        turn_steps: int,
        prefill: PrefillBudget | None = None,
        shareable: Callable[[Mix], bool] = lambda _: True,
    ) -> None:
        """Args:
        prefill: what bounds prompts beside decodes, if not `step_tokens` alone.
        shareable: whether a mix can run in mixed mode at all; the others always run by themselves.
        """
        self._cache = cache
        self._max_batch = max_batch
        self._step_tokens = step_tokens
        self._prefill = prefill or PrefillBudget(0.0)
        self._shareable = shareable
        self.service = ServiceCounters()
        self._turns = Turns(turn_steps, shareable, self.service)
        self._lanes = self._turns.lanes
        self._stuck: Sequence | None = None
        """Who gave its room back in the last step because all that is left belongs to older ones."""
        self._window = 0
        """Where the next step's streams begin among those of lanes that hold more than a step has room for."""
        self.preemptions = self._begun = 0
        self.failed: list[Sequence] = []
        """Whose memory could not be had in the last step: whoever runs the steps must end them."""

    @property
    def idle(self) -> bool:
        return not self._lanes

    @property
    def running(self) -> int:
        return sum(len(lane.running) for lane in self._lanes.values())

    @property
    def decoding(self) -> int:
        """Running sequences that get a token at every step of their turn."""
        return sum(sequence.decodes for lane in self._lanes.values() for sequence in lane.running)

    @property
    def lanes(self) -> Items[Lane]:
        """Every lane, the one whose turn it is in front."""
        return list(self._lanes.values())

    def add(self, sequence: Sequence) -> None:
        """Take in a sequence whose experts are resident."""
        sequence.state = SequenceState.WAITING
        self.service.wait(sequence.request.tenant)
        self._lanes.setdefault(sequence.mix, Lane(sequence.mix)).waiting.append(sequence)

    def remove(self, sequence: Sequence) -> bool:
        """Forget a sequence, finished or cancelled, and free its memory at once; False if it never was here."""
        lane = self._lanes.get(sequence.mix)
        if lane is None or sequence.state not in (SequenceState.WAITING, SequenceState.RUNNING):
            return False
        if sequence.state is SequenceState.RUNNING:
            lane.running.remove(sequence)
        else:
            lane.waiting.remove(sequence)
            self.service.stop_waiting(sequence.request.tenant)
        self.service.leave(sequence.request.tenant)
        self._cache.release(sequence)
        sequence.state = SequenceState.FINISHED
        if lane.empty:
            del self._lanes[sequence.mix]
        return True

    def demand(self) -> list[Demand]:
        """What waits or runs, lane by lane: one row per stream, and of every prompt what fits a step."""
        demand = []
        for lane in self._lanes.values():
            sequences = [*lane.running, *lane.waiting]
            rows = min(self._step_tokens, sum(sequence.pending for sequence in sequences))
            steps = max(sequence.max_tokens - sequence.output_length for sequence in sequences)
            demand.append(Demand(lane.mix, rows, steps, len(sequences)))
        return demand

    def schedule(self, *, mixed: bool) -> Batch | None:
        """The next step, or None when there is none: nothing waits, or all of it is in `failed`.

        A turn lasts `turn_steps` steps while others wait; the next goes to the lane with the tenant served least; in
        mixed mode all lanes that can share steps have theirs together. Decodes come first, so that running streams
        advance at every step of their turn; the rest of `step_tokens`, or what the prefill budget leaves of it, goes to
        prompts, in chunks: of the tenant served least, in order of arrival.

        Whatever waits for room that older ones hold in lanes that pause gets it only if these come further. So the lane
        of the oldest has the turn after somebody got stuck, and who cannot even begin leaves its turn to them.
        """
        if not self._lanes:
            return None
        self.failed.clear()
        stuck, self._stuck = self._stuck, None
        holders = [] if stuck is None else self._holders()
        if holders:
            self._window = 0
            oldest = min(holders, key=lambda lane: min(sequence.id for sequence in lane.running))
            lanes = self._turns.give(oldest, stuck, mixed=mixed)
        else:
            lanes = self._turns.step(mixed=mixed)
        work = self._fill(lanes)
        if not work:
            self._window = 0
            owed = self._next(lanes)
            for lane in sorted(self._holders(), key=self._turns.served):
                work = self._fill(self._turns.give(lane, owed, mixed=mixed))
                if work:
                    break
        assert work or self.failed, "the oldest can always run, and with nobody running all memory is free"
        if not work:
            return None
        work.sort(key=lambda item: (not item.sequence.mix.is_base, item.sequence.mix.digest))
        return Batch(work, mixed and self._shareable(work[0].sequence.mix))

    def _holders(self) -> list[Lane]:
        """Lanes that hold memory."""
        return [lane for lane in self._lanes.values() if lane.running]

    def _fill(self, lanes: Items[Lane]) -> list[Work]:
        budget = self._step_tokens
        bounded = False
        work: list[Work] = []
        for sequence in sorted(self._streams(lanes), key=lambda s: (s.pending > 1, s.id)):
            if sequence.pending > 1 and not bounded:
                budget, bounded = min(budget, self._prompt_tokens(lanes)), True
            if sequence.state is not SequenceState.RUNNING:
                continue  # preempted for the sake of one before it
            count = min(sequence.pending, max(budget, 1 if sequence.pending == 1 else 0))
            if count and self._make_room(sequence, sequence.computed + count):
                work.append(Work(sequence, count))
                budget -= count
        # From here on nobody in `work` is preempted: what they will compute can be shared in this very step.
        work = [item for item in work if item.sequence.state is SequenceState.RUNNING]
        for item in work:
            self._settle(item)
        if not bounded:
            budget = min(budget, self._prompt_tokens(lanes))
        while budget > 0 and sum(len(lane.running) for lane in lanes) < self._max_batch:
            newcomer, owed = self._next(lanes), self._turns.owed
            if newcomer is None or (owed is not None and self._rank(owed) < self._rank(newcomer)):
                break
            # Newcomers never preempt: they wait for memory that others give back by themselves.
            if not self._begin(newcomer, budget):
                if newcomer in self.failed or (not work and self._preempt_paused(lanes, newcomer)):
                    continue
                break
            lane = self._lanes[newcomer.mix]
            lane.waiting.remove(newcomer)
            lane.running.append(newcomer)
            self.service.stop_waiting(newcomer.request.tenant)
            newcomer.state = SequenceState.RUNNING
            self._begun += 1
            self._cache.note_reuse(newcomer)
            work.append(Work(newcomer, min(newcomer.pending, budget)))
            self._settle(work[-1])
            budget -= work[-1].count
        return work

    def _streams(self, lanes: Items[Lane]) -> list[Sequence]:
        """Who runs in the next step. Lanes that took turns before they shared steps may hold more streams than a step
        has room for; these take turns, too."""
        streams = sorted((s for lane in lanes for s in lane.running), key=lambda s: s.id)
        if len(streams) <= self._max_batch:
            return streams
        start = self._window % len(streams)
        self._window = start + self._max_batch
        return (streams[start:] + streams[:start])[: self._max_batch]

    def _prompt_tokens(self, lanes: Items[Lane]) -> int:
        """Most tokens of prompts in a step of these lanes."""
        running = [sequence for lane in lanes for sequence in lane.running]
        decodes = sum(sequence.decodes for sequence in running)
        places = max(0, self._max_batch - len(running))
        waiting = [sequence for lane in lanes for sequence in lane.waiting]
        reading = [sequence for sequence in running if not sequence.decodes]
        prompts = len(reading) + min(places, len(waiting))
        longest = max((len(sequence.tokens) for sequence in (*reading, *waiting)), default=0)
        bound = self._prefill.prompt_tokens(decodes, prompts, longest)
        return self._step_tokens if bound is None else bound

    def _settle(self, item: Work) -> None:
        """What follows from work that will be done: its tenant is charged, and what it computes can be found."""
        self.service.charge(item.sequence.request.tenant, item.count + item.samples)
        self._cache.publish(item.sequence, item.sequence.computed + item.count)

    def _next(self, lanes: Iterable[Lane]) -> Sequence | None:
        """Whose turn to begin it is among those that wait."""
        waiting = (one for lane in lanes for one in lane.waiting if one not in self.failed)
        return min(waiting, key=self._rank, default=None)

    def _rank(self, sequence: Sequence) -> tuple[int, int]:
        by_age = self._begun % LONGEST_WAIT == LONGEST_WAIT - 1
        return (0 if by_age else self.service.served(sequence.request.tenant)), sequence.id

    def _begin(self, sequence: Sequence, budget: int) -> bool:
        """Give a waiting sequence the blocks for its next tokens; False if they are short."""
        self._cache.adopt(sequence)
        if self._grow(sequence, sequence.computed + min(sequence.pending, budget)):
            return True
        self._cache.release(sequence)
        # With nothing adopted it takes less room at once. Two lanes that each need more than the other leaves would
        # else preempt each other at every turn, and never come further.
        return sequence not in self.failed and self._grow(sequence, min(sequence.pending, budget))

    def _make_room(self, sequence: Sequence, tokens: int) -> bool:
        """Grow a running sequence, preempting others (youngest first) until it fits; False if it was itself the
        youngest and has been preempted."""
        while not self._grow(sequence, tokens):
            if sequence in self.failed:
                self._suspend(sequence)
                return False
            victim = self._youngest(self._lanes.values())
            assert victim is not None
            self._suspend(victim)
            if victim is sequence:
                self._stuck = sequence
                return False
        return True

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """As the cache does it. Where the machine has no memory for that, this one sequence fails and not the step:
        what others will compute in it can be found already."""
        try:
            return self._cache.grow(sequence, tokens)
        except (MemoryError, torch.OutOfMemoryError):
            log.exception("no memory for a request's next step")
            self.failed.append(sequence)
            return False

    def _preempt_paused(self, lanes: Items[Lane], newcomer: Sequence) -> bool:
        """Free memory for lanes that have nothing to run while paused lanes hold it all; False if none can be. Only who
        is younger gives way: two that preempt each other would never end."""
        victim = self._youngest(lane for lane in self._lanes.values() if lane not in lanes)
        if victim is None or victim.id < newcomer.id:
            return False
        self._suspend(victim)
        return True

    def _youngest(self, lanes: Iterable[Lane]) -> Sequence | None:
        return max((s for lane in lanes for s in lane.running), key=lambda s: s.id, default=None)

    def _suspend(self, sequence: Sequence) -> None:
        """Take a running sequence's memory; it keeps its tokens and recomputes when its time comes again."""
        lane = self._lanes[sequence.mix]
        lane.running.remove(sequence)
        lane.waiting.appendleft(sequence)
        self.service.wait(sequence.request.tenant, again=True)
        sequence.state = SequenceState.WAITING
        self._cache.release(sequence)
        self.preemptions += 1
