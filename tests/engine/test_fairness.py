"""Tenants share the engine: whoever asks for more gets no more than the others, and nothing lies idle for it."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.fairness import LONGEST_WAIT, ServiceCounters
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence, SequenceState
from server.engine.types import EngineRequest, SamplingParams
from store.mix import BASE_MIX, Mix
from tests.engine.test_scheduler import make

LONGEST_PROMPT, LONGEST_ANSWER = 40, 20


def sequence(tenant: str | None, prompt: int, answer: int, mix: Mix = BASE_MIX) -> Sequence:
    tokens = tuple(random.Random(f"{tenant} {prompt} {answer}").choices(range(256), k=prompt))
    request = EngineRequest(tokens, SamplingParams(max_tokens=answer, temperature=0.0), mix, tenant)
    return Sequence(request, answer, emit=lambda event: None)


def step(scheduler: Scheduler, served: Counter[str | None], *, mixed: bool) -> list[Sequence]:
    """Run one step; notes what each tenant got of it, by the rule of `ServiceCounters`. The finished sequences."""
    batch = scheduler.schedule(mixed=mixed)
    assert batch is not None
    finished = []
    for item in batch.work:
        samples = item.samples
        served[item.sequence.request.tenant] += item.count + samples
        item.sequence.computed += item.count
        if samples and item.sequence.append(7).finish is not None:
            scheduler.remove(item.sequence)
            finished.append(item.sequence)
    return finished


@given(st.integers(0, 1 << 20), st.integers(1, 8), st.integers(8, 64), st.booleans())
@settings(deadline=None, max_examples=40)
def test_service_of_tenants_that_always_wait_differs_by_a_batch_at_most(
    seed: int, max_batch: int, step_tokens: int, mixed: bool
) -> None:
    """One tenant floods the server with requests of any size, of mixes of its own in merged mode; two others keep two
    waiting each. What they got in any stretch of time differs by no more than a bound that does not grow."""
    rng = random.Random(seed)
    scheduler, _ = make(blocks=512, max_batch=max_batch, step_tokens=step_tokens, turn_steps=4)
    served: Counter[str | None] = Counter()
    mixes = [BASE_MIX, *(Mix.of({name: 1.0}) for name in "abc")] if mixed else [BASE_MIX]

    def ask(tenant: str) -> None:
        size = rng.randint(1, LONGEST_PROMPT), rng.randint(1, LONGEST_ANSWER)
        scheduler.add(sequence(tenant, *size, rng.choice(mixes) if tenant == "flood" else mixes[0]))

    for _ in range(60):
        ask("flood")
    for tenant in ("one", "two"):
        for _ in range(2 + max_batch):
            ask(tenant)
    bound = 2 * max_batch * (LONGEST_PROMPT + 2 * LONGEST_ANSWER)
    widest = 0
    for _ in range(300):
        for finished in step(scheduler, served, mixed=mixed):
            assert finished.request.tenant is not None
            ask(finished.request.tenant)
        amounts = [served[tenant] for tenant in ("flood", "one", "two")]
        widest = max(widest, max(amounts) - min(amounts))
    assert widest <= bound
    assert min(served.values()) > 0


def test_a_flood_of_mixes_leaves_another_tenant_its_turns() -> None:
    """In merged mode, where mixes take turns: twenty mixes of one tenant get as much as one of another."""
    scheduler, _ = make(max_batch=8, turn_steps=2, blocks=512)
    served: Counter[str | None] = Counter()
    for number in range(20):
        scheduler.add(sequence("flood", 4, 400, Mix.of({f"mix{number}": 1.0})))
    scheduler.add(sequence("quiet", 4, 400))
    for _ in range(200):
        step(scheduler, served, mixed=False)
    assert served["quiet"] == pytest.approx(served["flood"], rel=0.1)
    waited = {lane.mix: sum(one.output_length for one in (*lane.running, *lane.waiting)) for lane in scheduler.lanes}
    assert min(waited.values()) > 0, "nobody's mix is left out"


def test_who_comes_late_goes_first_and_saves_nothing_up() -> None:
    scheduler, _ = make(max_batch=2, step_tokens=256)
    served: Counter[str | None] = Counter()
    for _ in range(30):
        scheduler.add(sequence("early", 8, 8))
    for _ in range(40):
        step(scheduler, served, mixed=True)
    late = [sequence("late", 8, 8) for _ in range(10)]
    for one in late:
        scheduler.add(one)
    began = Counter(served)
    for _ in range(8):
        step(scheduler, served, mixed=True)
    assert late[0].state is not SequenceState.WAITING, "the next room is its own"
    for _ in range(40):
        step(scheduler, served, mixed=True)
    got = {tenant: served[tenant] - began[tenant] for tenant in served}
    assert abs(got["late"] - got["early"]) <= 2 * 2 * (8 + 16), "no more than the others, for all its absence"


@pytest.mark.parametrize("answer", [20, 1000])
def test_who_comes_back_does_not_stop_the_stream_that_ran_alone_meanwhile(answer: int) -> None:
    """In merged mode, where they take turns, with one long answer or with many short ones."""
    scheduler, _ = make(blocks=512, turn_steps=4)
    served: Counter[str | None] = Counter()
    back = sequence("back", 4, 4, Mix.of({"a": 1.0}))
    scheduler.add(back)
    step(scheduler, served, mixed=False)
    stream = sequence("stream", 4, 4000)
    scheduler.add(stream)
    for _ in range(500):
        step(scheduler, served, mixed=False)
    gap = 0
    for _ in range(200):
        if back.state is SequenceState.FINISHED:
            back = sequence("back", 4, answer, Mix.of({"a": 1.0}))
            scheduler.add(back)
        before = stream.output_length
        step(scheduler, served, mixed=False)
        gap = 0 if stream.output_length > before else gap + 1
        assert gap <= 12
    assert served["back"] > 200


def test_a_stream_that_runs_beside_the_others_saves_nothing_up_either() -> None:
    counters = ServiceCounters()
    for tenant in ("trickle", "others"):
        counters.wait(tenant)
        counters.stop_waiting(tenant)
    counters.charge("others", 100)
    counters.wait("trickle")
    assert counters.served("trickle") == 100
    counters.stop_waiting("trickle")
    counters.leave("others")
    counters.charge("trickle", 1)
    for _ in range(2):
        counters.leave("trickle")
    counters.wait("new")
    assert counters.served("new") == 101, "as much as the one that left last"


def test_memory_that_older_requests_hold_goes_to_the_tenant_that_waits_for_it_first() -> None:
    """In merged mode: a tenant's streams hold all of it, and its queue must not take what they give back."""
    scheduler, _ = make(blocks=16, step_tokens=64, turn_steps=8)
    served: Counter[str | None] = Counter()
    for _ in range(40):
        scheduler.add(sequence("flood", 40, 60, Mix.of({"a": 1.0})))
    for _ in range(40):
        step(scheduler, served, mixed=False)
    late = sequence("late", 60, 10, Mix.of({"c": 1.0}))
    scheduler.add(late)
    steps = 0
    while late.state is not SequenceState.FINISHED:
        step(scheduler, served, mixed=False)
        steps += 1
    assert steps <= 100, "about one answer of the flood, where its whole queue takes a thousand"


@pytest.mark.parametrize("mix", [BASE_MIX, Mix.of({"a": 1.0})], ids=["place", "turn"])
def test_a_request_comes_to_its_turn_whatever_its_tenant_gets_elsewhere(mix: Mix) -> None:
    """In the lane of others that always have a request waiting, and in one of its own."""
    scheduler, _ = make(blocks=512, max_batch=1, turn_steps=2)
    served: Counter[str | None] = Counter()
    late = sequence("busy", 4, 4, mix)
    for one in (*(sequence("others", 4, 4) for _ in range(2)), late):
        scheduler.add(one)
    for _ in range(4 * LONGEST_WAIT + 4):
        scheduler.service.charge("busy", 100)
        for finished in step(scheduler, served, mixed=False):
            scheduler.add(sequence(str(finished.request.tenant), 4, 4))
    assert late.state is SequenceState.FINISHED or late.output_length


@given(st.integers(0, 1 << 20))
@settings(deadline=None, max_examples=30)
def test_no_room_is_left_while_somebody_waits(seed: int) -> None:
    rng = random.Random(seed)
    most, budget = rng.randint(1, 6), rng.randint(8, 40)
    scheduler, cache = make(blocks=512, max_batch=most, step_tokens=budget)
    for _ in range(30):
        scheduler.add(sequence(rng.choice("abc"), rng.randint(1, 40), rng.randint(1, 12)))
    while not scheduler.idle:
        batch = scheduler.schedule(mixed=True)
        assert batch is not None
        waiting = sum(len(lane.waiting) for lane in scheduler.lanes)
        full = scheduler.running == most or sum(item.count for item in batch.work) >= budget
        assert full or not waiting
        for item in batch.work:
            samples = item.samples
            item.sequence.computed += item.count
            if samples and item.sequence.append(7).finish is not None:
                scheduler.remove(item.sequence)
    assert cache.used_bytes == 0


def test_a_preempted_tenant_is_not_taken_for_one_that_has_been_away() -> None:
    counters = ServiceCounters()
    counters.wait("a")
    counters.stop_waiting("a")
    counters.wait("b")
    counters.charge("b", 50)
    counters.wait("a", again=True)
    assert counters.served("a") == 0
    counters.stop_waiting("a")
    counters.wait("a")
    assert counters.served("a") == 50
