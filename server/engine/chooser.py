"""Merged or mixed: which costs less for what waits now, with some reluctance to change."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from collections.abc import Sequence as Items
from functools import partial

from server.engine.costs import Costs
from server.engine.expert import DecodedExpert
from server.engine.options import Mode
from server.engine.scheduler import Demand
from store.mix import Mix

RELUCTANCE = 0.9
"""The other mode must cost less than this share of the present one."""


class ModeChooser:
    """Chooses a mode for every step from calibrated costs.

    To advance every sequence by one token, mixed mode takes one step with all rows and the surcharge of every expert's
    deltas; merged mode takes one step per mix, and patches the weights once per turn of `turn_steps` steps. The first
    step of a turn has the prompts. Mixes that cannot run beside the weights take steps of their own in either mode.

    Attributes:
        mode: the present one.
        changes: how often it changed.
    """

    def __init__(
        self,
        costs: Costs,
        turn_steps: int,
        shareable: Callable[[Mix, Mapping[str, DecodedExpert]], bool] = lambda *_: True,
    ) -> None:
        """Args:
        shareable: whether a mix of these experts can run beside the weights.
        """
        self._costs = costs
        self._turn_steps = turn_steps
        self._shareable = shareable
        self.mode = Mode.MIXED
        self.changes = 0

    def choose(
        self, demand: Items[Demand], experts: Mapping[str, DecodedExpert], built: Collection[Mix], room: int = 1
    ) -> Mode:
        """The mode of the next step.

        Args:
            demand: what waits, by mix; not empty.
            experts: at least every expert of the mixes in demand, by digest.
            built: the mixes whose weights lie ready.
            room: how many mixes' weights are kept.
        """
        own = [lane for lane in demand if not self._shareable(lane.mix, experts)]
        beside = [lane for lane in demand if lane not in own]
        if all(lane.mix.is_base for lane in beside):
            return self.mode
        merged = self._merged_cost(demand, experts, built, room)
        mixed = self._mixed_cost(beside, experts) + self._merged_cost(own, experts, built, room)
        present, other = (merged, mixed) if self.mode is Mode.MERGED else (mixed, merged)
        if other < RELUCTANCE * present:
            self.mode = Mode.MIXED if self.mode is Mode.MERGED else Mode.MERGED
            self.changes += 1
        return self.mode

    def _mixed_cost(self, demand: Items[Demand], experts: Mapping[str, DecodedExpert]) -> float:
        longest = max(self._turn(lane) for lane in demand)
        rows, streams = sum(lane.rows for lane in demand), sum(lane.streams for lane in demand)
        cost = _average(self._costs.step, rows, streams, longest)
        for lane in demand:
            for digest, _ in lane.mix.parts:
                surcharge = partial(self._costs.surcharge, experts[digest])
                cost += _average(surcharge, lane.rows, lane.streams, self._turn(lane))
        return cost

    def _merged_cost(
        self, demand: Items[Demand], experts: Mapping[str, DecodedExpert], built: Collection[Mix], room: int
    ) -> float:
        cost = sum(_average(self._costs.step, lane.rows, lane.streams, self._turn(lane)) for lane in demand)
        to_patch = [lane for lane in demand if not lane.mix.is_base]
        if len(to_patch) <= room:  # else each is patched over before its next turn
            to_patch = [lane for lane in to_patch if lane.mix not in built]
        for lane in to_patch:
            patch = sum(self._costs.patching(experts[digest]) for digest, _ in lane.mix.parts)
            cost += patch / self._turn(lane)
        return cost

    def _turn(self, lane: Demand) -> int:
        return min(self._turn_steps, max(1, lane.steps))


def _average(seconds: Callable[[int], float], rows: int, streams: int, steps: int) -> float:
    """Of so many steps, of which the first has `rows` rows, the others one per stream."""
    return (seconds(rows) + (steps - 1) * seconds(streams)) / steps
