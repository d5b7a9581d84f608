"""Turns, budgets and preemption, without a model."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch

from server.engine.kv_cache import BLOCK_TOKENS, KVCache, KVShape
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence, SequenceState
from server.engine.types import EngineRequest, SamplingParams
from store.mix import BASE_MIX, Mix

SHAPE = KVShape(layers=1, kv_heads=1, head_dim=1, dtype=torch.float32)


def make(blocks: int = 64, **options: Any) -> tuple[Scheduler, KVCache]:
    cache = KVCache(SHAPE, (blocks + 1) * SHAPE.block_bytes, torch.device("cpu"))
    defaults = {"max_batch": 8, "step_tokens": 32, "turn_steps": 4}
    return Scheduler(cache, **(defaults | options)), cache


def sequence(
    prompt: int = 4, max_tokens: int = 10, mix: Mix = BASE_MIX, tenant: str | None = None, first: int = 0
) -> Sequence:
    """A request whose prompt counts from `first`: those that begin alike share blocks."""
    tokens = tuple(range(first, first + prompt))
    request = EngineRequest(tokens, SamplingParams(max_tokens=max_tokens, temperature=0.0), mix, tenant)
    return Sequence(request, max_tokens, emit=lambda event: None)


def step(scheduler: Scheduler, *, mixed: bool = False) -> tuple[Mix, list[Sequence]]:
    """Run one step as the engine would, with a model that always says 7; the first mix and all sequences."""
    batch = scheduler.schedule(mixed=mixed)
    assert batch is not None
    work = batch.work
    mix = work[0].sequence.mix
    assert len(batch.by_mix()) == len({item.sequence.mix for item in work}), "rows of a mix are neighbours"
    assert mixed or len(batch.by_mix()) == 1
    for item in work:
        samples = item.samples
        item.sequence.computed += item.count
        if samples and item.sequence.append(7).finish is not None:
            scheduler.remove(item.sequence)
    return mix, [item.sequence for item in work]


def test_sequences_of_one_mix_join_and_leave_a_running_batch() -> None:
    scheduler, cache = make()
    first, second = sequence(max_tokens=5), sequence(max_tokens=2)
    scheduler.add(first)
    assert step(scheduler)[1] == [first]
    scheduler.add(second)
    assert step(scheduler)[1] == [first, second]
    assert step(scheduler)[1] == [first, second]
    assert step(scheduler)[1] == [first]
    assert step(scheduler)[1] == [first]
    assert scheduler.idle
    assert scheduler.schedule(mixed=False) is None
    assert cache.used_bytes == 0


def test_a_long_prompt_is_cut_so_that_running_streams_advance_at_every_step() -> None:
    scheduler, _ = make(step_tokens=32)
    stream, long = sequence(max_tokens=20), sequence(prompt=100)
    scheduler.add(stream)
    step(scheduler)
    scheduler.add(long)
    for expected in (31, 31, 31, 7):
        batch = scheduler.schedule(mixed=False)
        assert batch is not None
        counts = {item.sequence.id: item.count for item in batch.work}
        assert counts == {stream.id: 1, long.id: expected}
        for item in batch.work:
            samples = item.samples
            item.sequence.computed += item.count
            if samples:
                item.sequence.append(7)
    assert long.output_length == 1


def test_merged_mixes_take_turns_and_never_share_a_step() -> None:
    scheduler, _ = make(turn_steps=3)
    mixes = [BASE_MIX, Mix.of({"a": 1.0}), Mix.of({"b": 1.0})]
    for mix in mixes:
        scheduler.add(sequence(max_tokens=30, mix=mix))
    order = []
    for _ in range(18):
        mix, batch = step(scheduler)
        assert {s.mix for s in batch} == {mix}
        order.append(mixes.index(mix))
    assert order == [0, 0, 0, 1, 1, 1, 2, 2, 2] * 2


def test_mixed_steps_hold_all_mixes_and_those_that_cannot_share_take_turns() -> None:
    solo = Mix.of({"solo": 1.0})
    scheduler, _ = make(turn_steps=2, shareable=lambda mix: mix != solo)
    shared = [sequence(max_tokens=30, mix=mix) for mix in (Mix.of({"a": 1.0}), BASE_MIX, Mix.of({"b": 1.0}))]
    alone = sequence(max_tokens=30, mix=solo)
    for one in (*shared, alone):
        scheduler.add(one)
    together = {one.id for one in shared}
    steps = [{one.id for one in step(scheduler, mixed=True)[1]} for _ in range(16)]
    assert all(step in (together, {alone.id}) for step in steps)
    assert steps.count({alone.id}) == 8, "turns like those of all the others together"
    batch = scheduler.schedule(mixed=True)
    assert batch is not None
    assert batch.work[0].sequence.mix == BASE_MIX


@pytest.mark.parametrize("answer", [3, 1000])
def test_what_cannot_share_gets_every_other_turn_whoever_shares(answer: int) -> None:
    """Also where the tenant served least has a stream in every shared step, and where no lane lives for a turn."""
    solo = Mix.of({"solo": 1.0})
    scheduler, _ = make(blocks=4096, turn_steps=4, max_batch=32, step_tokens=256, shareable=lambda mix: mix != solo)
    numbers = itertools.count()

    def ask(tenant: str) -> Sequence:
        one = sequence(max_tokens=answer, mix=Mix.of({f"mix{next(numbers)}": 1.0}), tenant=tenant)
        scheduler.add(one)
        return one

    sharing = [ask(tenant) for tenant in ("one", *["many"] * 19)]
    for _ in range(12):
        step(scheduler, mixed=True)
        sharing = [ask(str(s.request.tenant)) if s.state is SequenceState.FINISHED else s for s in sharing]
    alone = sequence(max_tokens=1000, mix=solo, tenant="many")
    scheduler.add(alone)
    steps = []
    for _ in range(80):
        steps.append(alone in step(scheduler, mixed=True)[1])
        sharing = [ask(str(s.request.tenant)) if s.state is SequenceState.FINISHED else s for s in sharing]
    assert steps.count(True) == 40


def test_what_cannot_share_does_not_get_more_than_its_tenant_s_part() -> None:
    solo = Mix.of({"solo": 1.0})
    scheduler, _ = make(blocks=4096, turn_steps=4, max_batch=8, step_tokens=256, shareable=lambda mix: mix != solo)
    crowd = [sequence(max_tokens=1000, mix=solo, tenant="many") for _ in range(8)]
    one = sequence(max_tokens=1000, tenant="one")
    for each in (*crowd, one):
        scheduler.add(each)
    for _ in range(400):
        step(scheduler, mixed=True)
    assert one.output_length == pytest.approx(sum(each.output_length for each in crowd), rel=0.1)


@pytest.mark.parametrize("max_batch", [1, 4])
def test_lanes_that_hold_more_than_a_batch_when_they_begin_to_share_all_go_on(max_batch: int) -> None:
    scheduler, _ = make(blocks=512, max_batch=max_batch, step_tokens=64)
    streams = [sequence(max_tokens=200, mix=Mix.of({name: 1.0})) for name in "ab" for _ in range(max_batch)]
    for one in streams:
        scheduler.add(one)
    for _ in range(16):
        step(scheduler)
    assert scheduler.running == 2 * max_batch
    late = sequence(max_tokens=1, mix=Mix.of({"a": 1.0}))
    scheduler.add(late)
    began = {one.id: one.output_length for one in streams}
    for _ in range(40):
        _, batch = step(scheduler, mixed=True)
        assert len(batch) == max_batch
    assert [one.output_length - began[one.id] for one in streams] == [20] * len(streams)
    assert late.state is SequenceState.WAITING, "until there are few enough of them"


def test_in_mixed_mode_the_oldest_prompt_comes_first_whatever_its_mix() -> None:
    scheduler, _ = make(step_tokens=8, max_batch=2)
    busy, rare = Mix.of({"busy": 1.0}), Mix.of({"rare": 1.0})
    arrivals = [sequence(prompt=8, max_tokens=3, mix=mix) for mix in (busy, busy, rare, busy, busy)]
    for one in arrivals:
        scheduler.add(one)
    done: list[Sequence] = []
    while not scheduler.idle:
        _, batch = step(scheduler, mixed=True)
        assert len(batch) <= 2
        done += [one for one in batch if one.state is SequenceState.FINISHED]
    assert [one.id for one in done] == [one.id for one in arrivals]


def test_a_rare_mix_waits_at_most_one_turn_of_each_other_mix() -> None:
    scheduler, _ = make(turn_steps=4)
    busy, rare = Mix.of({"busy": 1.0}), Mix.of({"rare": 1.0})
    rng = random.Random(0)
    waited = 0
    scheduler.add(sequence(max_tokens=4, mix=busy))
    waiting = None
    for tick in range(400):
        scheduler.add(sequence(max_tokens=rng.randint(1, 4), mix=busy))
        if waiting is None and tick % 7 == 0:
            waiting, waited = sequence(max_tokens=1, mix=rare), 0
            scheduler.add(waiting)
        _, batch = step(scheduler)
        if waiting is not None:
            waited += 1
            if waiting in batch:
                assert waited <= 5
                waiting = None


def test_the_youngest_gives_way_when_memory_is_short_and_finishes_later() -> None:
    scheduler, cache = make(blocks=4)
    old, young = sequence(prompt=BLOCK_TOKENS, max_tokens=40), sequence(prompt=BLOCK_TOKENS, max_tokens=40)
    scheduler.add(old)
    scheduler.add(young)
    finished = []
    for _ in range(200):
        if scheduler.idle:
            break
        _, batch = step(scheduler)
        finished += [s for s in batch if s.output_length == 40]
    assert finished == [old, young]
    assert scheduler.preemptions >= 1
    assert cache.used_bytes == 0


def test_a_paused_mix_gives_up_memory_that_the_turn_needs() -> None:
    scheduler, cache = make(blocks=4, turn_steps=2)
    paused = sequence(prompt=3 * BLOCK_TOKENS, max_tokens=16)
    other = sequence(prompt=3 * BLOCK_TOKENS, max_tokens=16, mix=Mix.of({"a": 1.0}))
    scheduler.add(paused)
    scheduler.add(other)
    done = set()
    for _ in range(500):
        if scheduler.idle:
            break
        _, batch = step(scheduler)
        done |= {s.id for s in batch if s.output_length == 16}
    assert done == {paused.id, other.id}
    assert cache.used_bytes == 0


@pytest.mark.parametrize("turn_steps", [4, 32])
def test_prompts_that_almost_fit_beside_the_oldest_let_it_finish(turn_steps: int) -> None:
    """The lane in front has the tenant that is served least for ever; one of its prompts after the other begins, grows,
    and is itself the youngest that must give way."""
    scheduler, cache = make(blocks=8, turn_steps=turn_steps)
    oldest = sequence(20, 100, Mix.of({"a": 1.0}), "many")
    scheduler.add(oldest)
    for _ in range(12):
        step(scheduler)
    for tenant, prompt in (("one", 100), ("many", 110)):
        scheduler.add(sequence(prompt, 10, Mix.of({"b": 1.0}), tenant, first=1000 * prompt))
    steps = 0
    while not scheduler.idle:
        step(scheduler)
        steps += 1
        assert steps < 300
    assert cache.used_bytes == 0


def test_streams_that_all_need_memory_when_they_begin_to_share_find_somebody_who_can_run() -> None:
    scheduler, cache = make(blocks=4, max_batch=1, step_tokens=16, turn_steps=1)
    scheduler.add(sequence(40, 5, Mix.of({"a": 1.0})))
    scheduler.add(sequence(14, 45, Mix.of({"b": 1.0})))
    mixed = False
    for _ in range(200):
        if scheduler.idle:
            break
        mixed = mixed or scheduler.running == 2
        step(scheduler, mixed=mixed)
    assert mixed
    assert scheduler.idle
    assert cache.used_bytes == 0


def test_a_machine_without_memory_fails_one_sequence_and_not_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one that runs nor one that is to begin; what has no memory is told, and keeps nothing."""
    scheduler, cache = make()
    growing, steady, newcomer = (sequence(prompt, mix=Mix.of({"a": 1.0}), first=100 * prompt) for prompt in (15, 4, 33))
    for one in (growing, steady):
        scheduler.add(one)
    step(scheduler)
    grow = cache.grow

    def fail(one: Sequence, tokens: int) -> bool:
        if one in (growing, newcomer) and cache.blocks_missing(one, tokens):
            raise torch.OutOfMemoryError
        return grow(one, tokens)

    monkeypatch.setattr(cache, "grow", fail)
    step(scheduler)
    scheduler.add(newcomer)
    assert step(scheduler)[1] == [steady]
    assert scheduler.failed == [growing, newcomer]
    for one in scheduler.failed:
        assert scheduler.remove(one)
    scheduler.remove(steady)
    assert cache.used_bytes == 0
    scheduler.add(newcomer := sequence(33))
    assert scheduler.schedule(mixed=False) is None
    assert scheduler.failed == [newcomer]


def test_blocks_that_could_not_be_cleared_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __setitem__(self, place: object, value: object) -> None:
            raise torch.OutOfMemoryError

    _, cache = make()
    monkeypatch.setattr(cache, "_storage", Full())
    with pytest.raises(torch.OutOfMemoryError):
        cache.grow(sequence(), 20)
    assert cache.used_bytes == 0


@pytest.mark.parametrize("mode", ["merged", "mixed", "changing"])
def test_random_traffic_always_ends_and_leaks_nothing(mode: str) -> None:
    for seed in range(30):
        rng = random.Random(seed)

        def mixed(rng: random.Random = rng) -> bool:
            return mode == "mixed" or (mode == "changing" and rng.random() < 0.5)

        scheduler, cache = make(
            blocks=rng.randint(6, 20),
            step_tokens=rng.randint(1, 40),
            turn_steps=rng.randint(1, 5),
            shareable=lambda mix: mix != Mix.of({"c": 1.0}),
        )
        open_: list[Sequence] = []
        for _ in range(40):
            mix = Mix.of({rng.choice("abc"): 1.0}) if rng.random() < 0.7 else BASE_MIX
            prompt = rng.randint(1, 60)
            one = sequence(prompt, rng.randint(1, 96 - prompt), mix)
            open_.append(one)
            scheduler.add(one)
            for _ in range(rng.randint(0, 5)):
                if not scheduler.idle:
                    step(scheduler, mixed=mixed())
            if rng.random() < 0.2:
                scheduler.remove(rng.choice(open_))
        for _ in range(100_000):
            if scheduler.idle:
                break
            step(scheduler, mixed=mixed())
        assert scheduler.idle
        assert cache.used_bytes == 0


def test_removing_twice_is_harmless() -> None:
    scheduler, cache = make()
    one = sequence()
    assert not scheduler.remove(one)
    scheduler.add(one)
    step(scheduler)
    assert scheduler.remove(one)
    assert not scheduler.remove(one)
    assert cache.used_bytes == 0
