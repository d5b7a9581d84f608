"""Prompts beside streams: what a step takes of them, by times on a machine of which everything is known."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.prefill_budget import Observations, PrefillBudget
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence
from store.mix import BASE_MIX, Mix
from tests.engine.test_scheduler import make, sequence

SHARE = 0.25


@dataclass(frozen=True)
class Machine:
    """Seconds of steps: `base`, `row` for each stream, and for prompts `fixed` and `token` each."""

    base: float
    row: float
    fixed: float
    token: float

    def step(self, decodes: int, prompt_tokens: int) -> float:
        prompts = self.fixed + self.token * prompt_tokens if prompt_tokens else 0.0
        return self.base + self.row * decodes + prompts


machines = st.builds(Machine, st.floats(1e-3, 0.1), st.floats(0.0, 0.02), st.floats(0.0, 2e-3), st.floats(1e-4, 5e-3))


def run(
    scheduler: Scheduler,
    budget: PrefillBudget,
    machine: Machine,
    noise: random.Random | None = None,
    *,
    mixed: bool = True,
) -> float:
    """One step of a model that always says 7; what it took."""
    batch = scheduler.schedule(mixed=mixed)
    assert batch is not None
    rows = batch.rows()
    seconds = machine.step(*rows) * (1.0 if noise is None else noise.uniform(0.95, 1.05))
    budget.note_step(*rows, seconds)
    for item in batch.work:
        samples = item.samples
        item.sequence.computed += item.count
        if samples and item.sequence.append(7).finish is not None:
            scheduler.remove(item.sequence)
    return seconds


def streaming(machine: Machine, streams: int, share: float = SHARE) -> tuple[Scheduler, PrefillBudget]:
    """A scheduler with so many streams that have run for a while, beside newcomers too."""
    budget = PrefillBudget(share)
    scheduler, _ = make(blocks=4096, max_batch=64, step_tokens=512, prefill=budget)
    for _ in range(streams):
        scheduler.add(sequence(prompt=4, max_tokens=20_000))
    for prompt in (40, 300):
        one = sequence(prompt, max_tokens=1)
        scheduler.add(one)
        until_first_token(one, scheduler, budget, machine)
        for _ in range(10):
            run(scheduler, budget, machine)
    return scheduler, budget


def until_first_token(
    one: Sequence, scheduler: Scheduler, budget: PrefillBudget, machine: Machine, noise: random.Random | None = None
) -> list[float]:
    taken = []
    while not one.output_length:
        taken.append(run(scheduler, budget, machine, noise))
    return taken


@given(machines, st.integers(4, 16), st.integers(1, 400), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=50)
def test_a_lone_newcomer_lengthens_steps_by_its_share_at_most(
    machine: Machine, streams: int, prompt: int, noise: random.Random
) -> None:
    scheduler, budget = streaming(machine, streams)
    one = sequence(prompt, max_tokens=2)
    scheduler.add(one)
    plain = machine.step(streams, 0)
    least = max(1.5 * machine.fixed, machine.fixed + machine.token * max(2, prompt / 64 + 1))  # so much it always takes
    for seconds in until_first_token(one, scheduler, budget, machine, noise):
        # The noise, and what it does to the estimate.
        assert seconds <= 1.05 * 1.02 * (plain + max(1.3 * SHARE * plain, least))


@given(machines, st.integers(1, 16), st.lists(st.integers(1, 400), min_size=1, max_size=8), st.booleans())
@settings(deadline=None, max_examples=30)
def test_no_first_token_comes_later_than_64_steps_for_its_prompt_and_each_before_it(
    machine: Machine, streams: int, prompts: list[int], mistaken: bool
) -> None:
    """Even where the budget takes prompts for a thousand times as dear as they are."""
    scheduler, budget = streaming(machine, streams)
    believed = replace(machine, fixed=1e3 * machine.fixed, token=1e3 * machine.token) if mistaken else machine
    newcomers = [sequence(prompt, max_tokens=1) for prompt in prompts]
    for one in newcomers:
        scheduler.add(one)
    steps = 0
    for place, one in enumerate(newcomers):
        steps += len(until_first_token(one, scheduler, budget, believed))
        assert steps <= 64 * (place + 1)


@given(machines, st.integers(0, 1 << 20))
@settings(deadline=None, max_examples=20)
def test_bounded_traffic_of_all_mixes_always_ends_and_leaks_nothing(machine: Machine, seed: int) -> None:
    """With memory so short that sequences are preempted, in both modes by turns, and with cancellations."""
    rng = random.Random(seed)
    budget = PrefillBudget(SHARE)
    scheduler, cache = make(blocks=rng.randint(6, 20), step_tokens=rng.randint(1, 40), prefill=budget)
    open_: list[Sequence] = []
    for _ in range(30):
        prompt = rng.randint(1, 60)
        mix = Mix.of({rng.choice("abc"): 1.0}) if rng.random() < 0.7 else BASE_MIX
        open_.append(sequence(prompt, rng.randint(1, 96 - prompt), mix))
        scheduler.add(open_[-1])
        for _ in range(rng.randint(0, 5)):
            if not scheduler.idle:
                run(scheduler, budget, machine, rng, mixed=rng.random() < 0.5)
        if rng.random() < 0.2:
            scheduler.remove(rng.choice(open_))
    steps = 0
    while not scheduler.idle:
        run(scheduler, budget, machine, rng, mixed=rng.random() < 0.5)
        steps += 1
        assert steps < 100_000
    assert cache.used_bytes == 0


def test_streams_get_a_token_at_every_step_and_prompts_advance() -> None:
    machine = Machine(base=0.02, row=0.005, fixed=0.0, token=0.003)
    scheduler, budget = streaming(machine, 7)
    streams = [one for lane in scheduler.lanes for one in lane.running]
    newcomer = sequence(100, max_tokens=1)
    scheduler.add(newcomer)
    while not newcomer.output_length:
        before = [one.output_length for one in streams]
        pending = newcomer.pending
        run(scheduler, budget, machine)
        assert [one.output_length for one in streams] == [length + 1 for length in before]
        assert newcomer.output_length or 0 < pending - newcomer.pending <= 0.25 * 0.055 / 0.003 + 1


def test_a_crowd_takes_more_and_one_beside_a_single_stream_as_much_as_that() -> None:
    machine = Machine(base=0.02, row=0.005, fixed=0.0, token=0.001)
    scheduler, budget = streaming(machine, 7)
    del scheduler
    assert budget.prompt_tokens(7, 1, 100) == 13
    assert budget.prompt_tokens(7, 2, 100) == 26, "twice what was tried, as far as two newcomers may take so much"
    budget.note_step(7, 40, machine.step(7, 40))
    assert budget.prompt_tokens(7, 4, 100) == 55
    budget.note_step(1, 0, machine.step(1, 0))
    assert budget.prompt_tokens(1, 1, 100) == 25


def test_nothing_is_bounded_where_nobody_decodes_or_nobody_wants_it() -> None:
    _, budget = streaming(Machine(0.02, 0.005, 0.0, 0.003), 7)
    assert budget.prompt_tokens(0, 1, 4000) is None
    assert budget.feature_tokens(0, 1) is None
    _, without = streaming(Machine(0.02, 0.005, 0.0, 0.003), 7, share=0.0)
    assert without.prompt_tokens(7, 1, 4000) is None
    assert PrefillBudget(SHARE).prompt_tokens(7, 1, 4000) is None, "nothing is known yet"


def test_where_a_step_with_a_prompt_costs_much_by_itself_prompts_are_not_cut_small() -> None:
    """As on a GPU, whose graphs hold decodes only: one step with 500 tokens, and not 64 of 8."""
    machine = Machine(base=0.004, row=0.0, fixed=0.010, token=1e-5)
    scheduler, budget = streaming(machine, 8)
    one = sequence(500, max_tokens=1)
    scheduler.add(one)
    assert len(until_first_token(one, scheduler, budget, machine)) <= 2


def test_routing_features_and_prompts_share_what_a_step_may_grow_by() -> None:
    machine = Machine(base=0.02, row=0.005, fixed=0.0, token=0.001)
    _, budget = streaming(machine, 7)
    budget.note_features(20, 0.010)
    assert budget.feature_tokens(7, 0) == 27
    assert budget.feature_tokens(7, 1) == 13
    assert budget.prompt_tokens(7, 1, 100) == 3, "of 13.75 ms, 10 are spent"
    budget.note_step(7, 0, 0.055)
    assert budget.prompt_tokens(7, 1, 100) == 13


def test_a_single_slow_step_changes_nothing() -> None:
    machine = Machine(base=0.02, row=0.005, fixed=0.0, token=0.001)
    _, budget = streaming(machine, 7)
    budget.note_step(7, 0, 3.0)
    budget.note_step(7, 12, 3.0)
    assert budget.prompt_tokens(7, 1, 100) == 13


@given(st.floats(0, 1), st.floats(0, 0.1), st.lists(st.integers(1, 2000), min_size=1, max_size=60))
def test_a_line_through_what_lies_on_one_is_that_line(fixed: float, each: float, sizes: list[int]) -> None:
    seen = Observations(flat=True)
    for size in sizes:
        seen.note(size, fixed + each * size + 1e-6)
    line = seen.line()
    assert line is not None
    if len({size.bit_length() for size in sizes}) > 1 and len(sizes) == len({size.bit_length() for size in sizes}):
        for size in sizes:
            assert abs(line(size) - (fixed + each * size)) <= 1e-3 * (fixed + each * size) + 2e-6
    assert line.fixed >= 0
    assert line.each >= 0
