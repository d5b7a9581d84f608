"""Who runs in the next step.

Requests that share a mix form a lane. In mixed mode all lanes share every step; in merged mode one lane runs at a
time and lanes take turns. Sequences join and leave at every step. Where tenants compete for room or turns, the one that
has been served least comes first (`server.engine.fairness`); among one tenant's, who has waited longest.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from itertools import groupby

from server.engine.fairness import ServiceCounters
from server.engine.kv_cache import KVCache
from server.engine.prefill_budget import PrefillBudget
from server.engine.sequence import Sequence, SequenceState
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


@dataclass(frozen=True)
class Work:
    """One sequence's share of a step: its next `count` tokens."""

    sequence: Sequence
    count: int

    @property
    def samples(self) -> bool:
        """Whether the step reaches the sequence's last token, so that a new one can be sampled."""
        return self.count == self.sequence.pending


@dataclass(frozen=True)
class Batch:
    """A step's work, that of one mix side by side; the base's comes first.

    Attributes:
        mixed: whether deltas are applied beside the weights; otherwise all work has one mix, to be merged.
    """

    work: list[Work]
    mixed: bool

    def rows(self) -> tuple[int, int]:
        """How many streams get their next token, and how many tokens of prompts there are. To be asked before the
        sequences take note of the step."""
        decodes = sum(item.sequence.decodes for item in self.work)
        return decodes, sum(item.count for item in self.work) - decodes

    def by_mix(self) -> list[Batch]:
        """The same work, one batch per mix."""
        return [Batch(list(work), self.mixed) for _, work in groupby(self.work, key=lambda item: item.sequence.mix)]


@dataclass(frozen=True)
class Demand:
    """What a lane would put into the next steps: `rows` tokens of `mix`, for at most `steps` steps."""

    mix: Mix
    rows: int
    steps: int


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
        self._turn_steps = turn_steps
        self._prefill = prefill or PrefillBudget(0.0)
        self._shareable = shareable
        self._lanes: OrderedDict[Mix, Lane] = OrderedDict()
        self._steps_in_turn = 0
        self.service = ServiceCounters()
        self.preemptions = 0

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
        self._cache.release(sequence)
        sequence.state = SequenceState.FINISHED
        if lane.empty:
            if lane is self._front():
                self._steps_in_turn = 0
            del self._lanes[sequence.mix]
        return True

    def demand(self) -> list[Demand]:
        """What waits or runs, lane by lane: one row per stream, and of every prompt what fits a step."""
        demand = []
        for lane in self._lanes.values():
            sequences = [*lane.running, *lane.waiting]
            rows = min(self._step_tokens, sum(sequence.pending for sequence in sequences))
            steps = max(sequence.max_tokens - sequence.output_length for sequence in sequences)
            demand.append(Demand(lane.mix, rows, steps))
        return demand

    def schedule(self, *, mixed: bool) -> Batch | None:
        """The next step, or None when nothing waits.

        The lane in front keeps its turn for `turn_steps` steps while others wait, then goes to the back, and the first
        of those with the tenant served least comes next; in mixed mode all that can share its steps do. Decodes come
        first, so that running streams advance at every step of their turn; the rest of `step_tokens`, or what the
        prefill budget leaves of it, goes to prompts, in chunks: of the tenant served least, in order of arrival.
        """
        lane = self._front()
        if lane is None:
            return None
        if self._steps_in_turn >= self._turn_steps:
            self._steps_in_turn = 0
            self._lanes.move_to_end(lane.mix)
        if self._steps_in_turn == 0:
            lane = min(self._lanes.values(), key=self._served)
            self._lanes.move_to_end(lane.mix, last=False)
        self._steps_in_turn += 1
        shared = mixed and self._shareable(lane.mix)
        lanes = [other for other in self._lanes.values() if self._shareable(other.mix)] if shared else [lane]
        work = self._fill(lanes)
        assert work, "a lane that is not empty always has work: a lone sequence fits the cache"
        work.sort(key=lambda item: (not item.sequence.mix.is_base, item.sequence.mix.digest))
        return Batch(work, shared)

    def _front(self) -> Lane | None:
        return next(iter(self._lanes.values()), None)

    def _fill(self, lanes: Items[Lane]) -> list[Work]:
        budget = self._step_tokens
        bounded = False
        work: list[Work] = []
        running = sorted((s for lane in lanes for s in lane.running), key=lambda s: (s.pending > 1, s.id))
        for sequence in running[: self._max_batch]:
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
            newcomer = self._next(lanes)
            if newcomer is None:
                break
            # Newcomers never preempt: they wait for memory that others give back by themselves.
            if not self._begin(newcomer, budget):
                if work or not self._preempt_paused(lanes):
                    break
                continue
            lane = self._lanes[newcomer.mix]
            lane.waiting.remove(newcomer)
            lane.running.append(newcomer)
            self.service.stop_waiting(newcomer.request.tenant)
            newcomer.state = SequenceState.RUNNING
            self._cache.note_reuse(newcomer)
            work.append(Work(newcomer, min(newcomer.pending, budget)))
            self._settle(work[-1])
            budget -= work[-1].count
        return work

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
        waiting = (sequence for lane in lanes for sequence in lane.waiting)
        return min(waiting, key=lambda one: (self.service.served(one.request.tenant), one.id), default=None)

    def _served(self, lane: Lane) -> int:
        """The service of the tenant in a lane that got least."""
        return min(self.service.served(one.request.tenant) for one in (*lane.running, *lane.waiting))

    def _begin(self, sequence: Sequence, budget: int) -> bool:
        """Give a waiting sequence the blocks for its next tokens; False if they are short."""
        self._cache.adopt(sequence)
        if self._cache.grow(sequence, sequence.computed + min(sequence.pending, budget)):
            return True
        self._cache.release(sequence)
        # With nothing adopted it takes less room at once. Two lanes that each need more than the other leaves would
        # else preempt each other at every turn, and never come further.
        return self._cache.grow(sequence, min(sequence.pending, budget))

    def _make_room(self, sequence: Sequence, tokens: int) -> bool:
        """Grow a running sequence, preempting others (youngest first) until it fits; False if it was itself the
        youngest and has been preempted."""
        while not self._cache.grow(sequence, tokens):
            victim = self._youngest(self._lanes.values())
            assert victim is not None
            self._suspend(victim)
            if victim is sequence:
                return False
        return True

    def _preempt_paused(self, lanes: Items[Lane]) -> bool:
        """Free memory for lanes that have nothing to run while paused lanes hold it all; False if none can be."""
        victim = self._youngest(lane for lane in self._lanes.values() if lane not in lanes)
        if victim is not None:
            self._suspend(victim)
        return victim is not None

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
