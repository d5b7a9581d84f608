"""Who runs in the next step.

Requests that share a mix form a lane. One lane runs at a time (merged mode); lanes take turns, and within a lane
sequences join and leave at every step.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field

from server.engine.kv_cache import KVCache
from server.engine.sequence import Sequence, SequenceState
from store.mix import Mix


@dataclass
class Lane:
    """All sequences of one mix."""

    mix: Mix
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)
    """In order of arrival."""

    @property
    def empty(self) -> bool:
        return not self.waiting and not self.running


@dataclass(frozen=True)
class Work:
    """One sequence's share of a step: its next `count` tokens."""

    sequence: Sequence
    count: int

    @property
    def samples(self) -> bool:
        """Whether the step reaches the sequence's last token, so that a new one can be sampled."""
        return self.count == self.sequence.pending


class Scheduler:
    """Chooses lanes and fills steps; owns the sequences between their arrival and their end."""

    def __init__(self, cache: KVCache, *, max_batch: int, step_tokens: int, turn_steps: int) -> None:
        self._cache = cache
        self._max_batch = max_batch
        self._step_tokens = step_tokens
        self._turn_steps = turn_steps
        self._lanes: OrderedDict[Mix, Lane] = OrderedDict()
        self._steps_in_turn = 0
        self.preemptions = 0

    @property
    def idle(self) -> bool:
        return not self._lanes

    @property
    def running(self) -> int:
        return sum(len(lane.running) for lane in self._lanes.values())

    def add(self, sequence: Sequence) -> None:
        """Take in a sequence whose experts are resident."""
        sequence.state = SequenceState.WAITING
        self._lanes.setdefault(sequence.mix, Lane(sequence.mix)).waiting.append(sequence)

    def remove(self, sequence: Sequence) -> bool:
        """Forget a sequence, finished or cancelled, and free its memory at once; False if it never was here."""
        lane = self._lanes.get(sequence.mix)
        if lane is None or sequence.state not in (SequenceState.WAITING, SequenceState.RUNNING):
            return False
        (lane.running if sequence.state is SequenceState.RUNNING else lane.waiting).remove(sequence)
        self._cache.release(sequence)
        sequence.state = SequenceState.FINISHED
        if lane.empty:
            if lane is self._front():
                self._steps_in_turn = 0
            del self._lanes[sequence.mix]
        return True

    def schedule(self) -> tuple[Mix, list[Work]] | None:
        """The next step: a mix and its work, or None when nothing waits.

        The lane in front keeps its turn for `turn_steps` steps while others wait, then goes to the back. Decodes come
        first, so that running streams advance at every step of their turn; the rest of `step_tokens` goes to prompts,
        in chunks.
        """
        lane = self._front()
        if lane is None:
            return None
        if self._steps_in_turn >= self._turn_steps:
            self._steps_in_turn = 0
            self._lanes.move_to_end(lane.mix)
            lane = self._front()
            assert lane is not None
        self._steps_in_turn += 1
        work = self._fill(lane)
        assert work, "a lane that is not empty always has work: a lone sequence fits the cache"
        return lane.mix, work

    def _front(self) -> Lane | None:
        return next(iter(self._lanes.values()), None)

    def _fill(self, lane: Lane) -> list[Work]:
        budget = self._step_tokens
        work: list[Work] = []
        for sequence in sorted(lane.running, key=lambda s: s.pending > 1):
            if sequence.state is not SequenceState.RUNNING:
                continue  # preempted for the sake of one before it
            count = min(sequence.pending, max(budget, 1 if sequence.pending == 1 else 0))
            if count and self._make_room(sequence, sequence.computed + count):
                work.append(Work(sequence, count))
                budget -= count
        while lane.waiting and budget > 0 and len(lane.running) < self._max_batch:
            sequence = lane.waiting[0]
            count = min(sequence.pending, budget)
            # Newcomers never preempt: they wait for memory that others give back by themselves.
            if not self._cache.grow(sequence, sequence.computed + count):
                if work or not self._preempt_paused(lane):
                    break
                continue
            lane.waiting.popleft()
            lane.running.append(sequence)
            sequence.state = SequenceState.RUNNING
            work.append(Work(sequence, count))
            budget -= count
        return [item for item in work if item.sequence.state is SequenceState.RUNNING]

    def _make_room(self, sequence: Sequence, tokens: int) -> bool:
        """Grow a running sequence, preempting others (youngest first) until it fits; False if it was itself the
        youngest and has been preempted."""
        while not self._cache.grow(sequence, tokens):
            victim = self._youngest()
            self._suspend(victim)
            if victim is sequence:
                return False
        return True

    def _preempt_paused(self, lane: Lane) -> bool:
        """Free memory for a lane that has nothing to run while paused lanes hold it all; False if none can be."""
        holders = [s for other in self._lanes.values() if other is not lane for s in other.running]
        if not holders:
            return False
        self._suspend(max(holders, key=lambda s: s.id))
        return True

    def _youngest(self) -> Sequence:
        return max((s for lane in self._lanes.values() for s in lane.running), key=lambda s: s.id)

    def _suspend(self, sequence: Sequence) -> None:
        """Take a running sequence's memory; it keeps its tokens and recomputes when its time comes again."""
        lane = self._lanes[sequence.mix]
        lane.running.remove(sequence)
        lane.waiting.appendleft(sequence)
        sequence.state = SequenceState.WAITING
        self._cache.release(sequence)
        self.preemptions += 1
