"""Experts in memory: bytes bound them, use pins them, failures and waiting disturb nobody else."""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Callable, Collection, Iterator

import pytest
import torch

from server.engine.expert import DecodedExpert
from server.engine.fetching import CalledOff
from server.engine.kernels.types import DenseValues
from server.engine.load_thread import Errand
from server.engine.residency import STARVING, Residency, Ticket
from server.engine.tenant_lines import TenantLines
from store.errors import ExpertUnavailableError, SwitchyardError
from store.mix import BASE_MIX, Mix

UNIT = 400  # bytes of one hundred float32


class Source:
    """Experts named by size: `"x3"` takes three units. `gates` hold a load back; digests in `broken` fail."""

    def __init__(self) -> None:
        self.gates: dict[str, threading.Event] = {}
        self.broken: set[str] = set()
        self.loading: list[str] = []
        self.loaded: list[str] = []
        self.kept: list[str] = []
        self.given_up: list[str] = []
        self.claimed: list[tuple[str, int]] = []
        """Digests, and how many had been given up before."""
        self.dropped: list[str] = []
        self.host_room = 0
        """Units that can be fetched."""
        self.begun: list[str] = []
        self.fetched: list[tuple[str, set[str]]] = []
        """Digests, and who was to be spared."""
        self.forgotten: list[str] = []

    def decoded_bytes(self, digest: str) -> int:
        if digest == "unknown1":
            raise ExpertUnavailableError("its bytes are gone")
        return int(digest[-1]) * UNIT

    def load(self, digest: str) -> DecodedExpert:
        self.loading.append(digest)
        if digest in self.gates:
            assert self.gates[digest].wait(60)
        if digest in self.broken:
            raise RuntimeError("unreadable")
        self.loaded.append(digest)
        return DecodedExpert(digest, {"w": DenseValues(torch.zeros(100 * int(digest[-1])))})

    def keep(self, digest: str) -> None:
        self.kept.append(digest)

    def claim(self, digest: str) -> None:
        self.claimed.append((digest, len(self.given_up)))

    def evicted(self, expert: DecodedExpert) -> None:
        self.given_up.append(expert.digest)

    def drop(self, digest: str) -> None:
        self.dropped.append(digest)

    def fetch(self, digest: str, go_on: Callable[[], bool], spared: Collection[str]) -> bool:
        if digest in self.broken:
            raise ExpertUnavailableError("its bytes are gone")
        if digest in dict(self.fetched):
            return True
        if self.host_room < int(digest[-1]):
            return False
        self.begun.append(digest)
        gate = self.gates.get(f"fetch {digest}")
        is_open = gate is None
        for _ in range(6000):
            is_open = is_open or (gate is not None and gate.wait(0.01))
            if not go_on():
                raise CalledOff(digest)
            if is_open:
                break
        assert is_open
        self.host_room -= int(digest[-1])
        self.fetched.append((digest, set(spared)))
        return True

    def let_go(self, digest: str) -> None:
        self.forgotten.append(digest)


class Bench:
    """A residency with its posted commands run on demand, as the engine's thread would."""

    def __init__(self, units: int) -> None:
        self.source = Source()
        self.posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.now = 0.0
        self.residency = Residency(self.source, units * UNIT, self.posted.put, clock=lambda: self.now)
        self.granted: list[Mix] = []
        self.gone: set[Mix] = set()
        """Whose clients have gone: they release as soon as they are granted."""
        self.refused: dict[Mix, SwitchyardError] = {}

    def request(self, *digests: str) -> Mix:
        return self.ask(*digests).mix

    def ask(self, *digests: str, tenant: str | None = None) -> Ticket:
        mix = Mix.of(dict.fromkeys(digests, 1.0))

        def ready(error: SwitchyardError | None) -> None:
            if error is None:
                self.granted.append(mix)
                assert all(digest in self.residency.experts for digest in digests)
                if mix in self.gone:
                    self.residency.release(mix)
            else:
                self.refused[mix] = error

        return self.residency.request(mix, ready, tenant)

    def finish(self) -> None:
        """Until the loading thread has done all that was asked of it."""
        self.residency._thread.submit(lambda _: None, Errand.KEEP, "", None).future.result(timeout=60)

    def is_prepared(self) -> bool:
        """Whether there is no more to be done for those who wait."""
        return not self.residency._looks.under_way and self.residency._ahead._job is None

    def settle(self, until: Callable[[], bool]) -> None:
        while not until():
            self.posted.get(timeout=60)()
        while not self.posted.empty():
            self.posted.get()()
        assert self.residency.used_bytes <= self.residency.budget_bytes


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench(units=4)
    yield bench
    bench.residency.close()


def test_the_base_needs_nothing(bench: Bench) -> None:
    bench.request()
    assert bench.granted == [BASE_MIX]


def test_what_has_been_handed_out_is_kept_afterwards_and_what_failed_is_not(bench: Bench) -> None:
    bench.source.broken.add("b1")
    for digest in ("a1", "b1", "c1"):
        bench.request(digest)
    bench.settle(lambda: len(bench.granted) == 2 and len(bench.refused) == 1)
    bench.finish()
    assert bench.source.loaded == bench.source.kept == ["a1", "c1"]


def test_one_load_serves_all_who_wait_for_it(bench: Bench) -> None:
    for _ in range(3):
        bench.request("a1")
    bench.settle(lambda: len(bench.granted) == 3)
    assert bench.source.loaded == ["a1"]
    bench.request("a1")
    assert len(bench.granted) == 4, "a resident expert is granted at once"


def test_the_least_recently_used_goes_first_and_the_pinned_stays(bench: Bench) -> None:
    mixes = {name: bench.request(name) for name in ("a2", "b1", "c1")}
    bench.settle(lambda: len(bench.granted) == 3)
    for name in ("b1", "a2", "c1"):
        bench.residency.release(mixes[name])
    bench.request("b1")
    bench.request("d2")
    bench.settle(lambda: len(bench.granted) == 5)
    assert set(bench.residency.experts) == {"b1", "c1", "d2"}
    assert bench.source.given_up == ["a2"]
    assert bench.source.claimed[-1] == ("d2", 0), "what is kept of the new one is claimed before the old one is kept"
    stats = bench.residency.stats()
    assert (stats.evictions, stats.hits, stats.misses, stats.loads) == (1, 1, 4, 4)


def test_a_mix_waits_for_room_and_warm_mixes_pass_it(bench: Bench) -> None:
    busy = bench.request("a3")
    bench.settle(lambda: bench.granted == [busy])
    waiting = bench.request("b2")
    bench.settle(lambda: not bench.posted.empty() or not bench.residency._looks.under_way)
    bench.request("a3")
    assert bench.granted == [busy, busy]
    bench.residency.release(busy)
    bench.residency.release(busy)
    bench.settle(lambda: waiting in bench.granted)
    assert set(bench.residency.experts) == {"b2"}


def test_popular_experts_cannot_starve_a_rare_one(bench: Bench) -> None:
    """After a while as much is drained as the rare one needs, and no more."""
    few, many = bench.request("a2"), bench.request("b2")
    bench.request("b2")
    bench.settle(lambda: len(bench.granted) == 3)
    rare = bench.request("c1")
    bench.settle(lambda: not bench.residency._looks.under_way)
    for _ in range(5):
        bench.request("a2")
        bench.residency.release(few)
    assert len(bench.granted) == 8
    bench.now = STARVING + 1
    bench.request("a2")
    bench.residency.release(few)
    assert len(bench.granted) == 9, "the last to pass by; its end starts the drain"
    late = bench.request("a2")
    bench.request("b2")
    assert bench.granted[-1] == many, "experts that need not be drained take requests as ever"
    bench.residency.release(few)
    bench.settle(lambda: rare in bench.granted)
    assert bench.granted[-1] == rare
    bench.residency.release(rare)
    bench.settle(lambda: bench.granted[-1] == late)


def test_a_rare_one_whose_size_is_known_late_does_not_starve(bench: Bench) -> None:
    few = bench.request("a2")
    bench.request("b2")
    bench.settle(lambda: len(bench.granted) == 2)
    gate, measure = threading.Event(), bench.source.decoded_bytes

    def slowly(digest: str) -> int:
        assert gate.wait(60)
        return measure(digest)

    bench.source.decoded_bytes = slowly  # type: ignore[method-assign]
    rare = bench.request("c3")
    bench.now = STARVING + 1
    for _ in range(2):
        bench.request("a2")
        bench.residency.release(few)
    assert len(bench.granted) == 4, "nobody knows yet how much it needs"
    gate.set()
    bench.settle(lambda: not bench.residency._looks.under_way)
    late = [bench.request(digest) for digest in ("a2", "b2")]
    assert len(bench.granted) == 4, "both are drained, since it needs more than either"
    for mix in late:
        bench.residency.release(mix)
    bench.settle(lambda: rare in bench.granted)
    bench.residency.release(rare)
    bench.settle(lambda: bench.granted[-2:] == late)


def test_whoever_needs_no_room_passes_by_also_out_of_the_queue(bench: Bench) -> None:
    """Requests that came while their expert was being loaded, behind one that waits for room."""
    bench.residency._looks.sizes |= {"a1": UNIT, "c3": 3 * UNIT}
    bench.source.gates["a1"] = threading.Event()
    busy = bench.request("b3")
    bench.settle(lambda: bench.granted == [busy])
    first = bench.request("a1")
    large = bench.request("c3")
    bench.request("a1")
    bench.request("a1")
    bench.source.gates["a1"].set()
    bench.settle(lambda: first in bench.granted)
    assert bench.granted == [busy, first, first, first]
    assert bench.residency.waiting().keys() == {large}


def test_those_who_have_gone_while_they_waited_give_up_their_place(bench: Bench) -> None:
    """Nothing is measured or loaded for them any more, and nobody waits behind them."""
    busy = bench.request("a4")
    bench.settle(lambda: bench.granted == [busy])
    gate, measured = threading.Event(), []

    def measure(digest: str) -> int:
        assert gate.wait(60)
        measured.append(digest)
        return int(digest[-1]) * UNIT

    bench.source.decoded_bytes = measure  # type: ignore[method-assign]
    gone = [bench.ask(digest) for digest in ("b1", "c1", "d1")]
    for ticket in gone:
        bench.residency.cancel(ticket)
    assert not bench.residency.waiting()
    again, other = bench.request("c1"), bench.request("e1")
    gate.set()
    bench.settle(lambda: not bench.residency._looks.under_way)
    bench.residency.release(busy)
    bench.settle(lambda: {again, other} <= {*bench.granted})
    assert set(measured) <= {"b1", "c1", "e1"}, "what was begun goes on; d1 had not been"
    assert bench.source.loaded == ["a4", "c1", "e1"]
    bench.residency.cancel(gone[0])
    assert bench.granted == [busy, again, other], "a second time does nothing"


def test_a_load_goes_on_when_its_client_goes(bench: Bench) -> None:
    bench.source.gates["a1"] = threading.Event()
    ticket = bench.ask("a1")
    bench.settle(lambda: not bench.residency._looks.under_way)
    bench.residency.cancel(ticket)
    bench.gone = {ticket.mix}
    bench.source.gates["a1"].set()
    bench.settle(lambda: ticket.mix in bench.granted)
    assert bench.residency.pins()["a1"][1] == 0


def test_those_who_release_as_they_are_granted_are_granted_once(bench: Bench) -> None:
    """While the queue is gone through; what is resident when their turn comes needs no load."""
    first, second = bench.request("a2"), bench.request("b2")
    bench.settle(lambda: len(bench.granted) == 2)
    rare = bench.request("c1")
    bench.settle(lambda: not bench.residency._looks.under_way)
    bench.now = STARVING + 1
    bench.residency.request(BASE_MIX, lambda error: None)
    for _ in range(2):
        bench.request("b2")
    bench.residency.release(second)  # from here on a2, of the fewest users, is drained for the rare one
    for _ in range(3):
        bench.request("a2")
    assert bench.granted.count(first) == 1, "they wait behind the rare one"
    bench.gone = {first}
    for _ in range(2):
        bench.residency.release(second)  # which makes room, so that a2 stays
    bench.settle(lambda: rare in bench.granted)
    assert bench.granted.count(first) == 4
    assert bench.residency.pins()["a2"][1] == 1, "only the one that is still here"


def test_a_mix_larger_than_the_budget_is_refused_by_name(bench: Bench) -> None:
    mix = bench.request("a3", "b2")
    bench.settle(lambda: mix in bench.refused)
    assert "expert_bytes" in bench.refused[mix].message
    assert bench.residency.used_bytes == 0


def test_a_failed_load_fails_its_waiters_only(bench: Bench) -> None:
    bench.source.broken.add("b1")
    good, bad, both = bench.request("a1"), bench.request("b1"), bench.request("a1", "b1")
    bench.settle(lambda: len(bench.refused) == 2 and good in bench.granted)
    assert set(bench.refused) == {bad, both}
    bench.residency.release(good)
    bench.source.broken.clear()
    bench.request("b1")
    bench.settle(lambda: bad in bench.granted)


def test_bytes_that_are_gone_are_an_error_of_that_request(bench: Bench) -> None:
    gone = bench.request("unknown1")
    bench.settle(lambda: gone in bench.refused)
    assert bench.refused[gone].message == "its bytes are gone"


def test_dropping_waits_for_the_last_user(bench: Bench) -> None:
    mix = bench.request("a1")
    bench.settle(lambda: mix in bench.granted)
    bench.residency.drop("a1")
    assert "a1" in bench.residency.experts
    bench.residency.release(mix)
    assert "a1" not in bench.residency.experts
    assert bench.residency.used_bytes == 0
    assert bench.source.dropped == ["a1"], "and nobody keeps a copy"
    assert bench.source.given_up == []


def test_lines_of_tenants_are_served_in_turn() -> None:
    lines: TenantLines[str] = TenantLines()
    for item in ("a1", "a2", "b1", "a3", "c1", "b2"):
        lines.add(item, item[0])
    assert [*lines] == ["a1", "b1", "c1", "a2", "b2", "a3"]
    lines.remove("b1", "b")
    assert [*lines] == ["a1", "b2", "c1", "a2", "a3"], "it was not the next one: b keeps its place"
    lines.remove("a1", "a", ends_turn=False)
    assert lines.first() == ("a2", "a")
    lines.remove("a2", "a")
    assert [*lines] == ["b2", "c1", "a3"]
    for item in ("b2", "c1", "a3"):
        lines.remove(item, item[0])
    assert lines.first() is None


def eventually(condition: Callable[[], bool]) -> None:
    """What another thread does without posting it."""
    for _ in range(6000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError


def flooded(known: bool, *asked: tuple[str, str]) -> list[str]:
    """In which order experts are loaded that tenants ask for while the first one's is being loaded."""
    bench = Bench(units=9)
    bench.source.gates["a1"] = threading.Event()
    if known:
        bench.residency._looks.sizes |= {digest: UNIT for _, digest in asked}
    (tenant, digest), *others = asked
    bench.ask(digest, tenant=tenant)
    bench.settle(lambda: "a1" in bench.residency._slots)
    eventually(lambda: bench.source.loading == ["a1"])
    for tenant, digest in others:
        bench.ask(digest, tenant=tenant)
    bench.source.gates["a1"].set()
    bench.settle(lambda: len(bench.granted) == len(asked))
    bench.residency.close()
    return bench.source.loaded


@pytest.mark.parametrize("known", [False, True])
def test_a_flood_of_cold_experts_does_not_hold_up_another_tenant_s(known: bool) -> None:
    """Whether all sizes are known, so that all have their room at once, or none."""
    flood = [("flood", digest) for digest in ("a1", "b1", "c1", "d1", "e1")]
    assert flooded(known, *flood, ("quiet", "x1"), ("quiet", "y1")) == ["a1", "b1", "x1", "c1", "y1", "d1", "e1"]


def test_an_expert_that_two_tenants_wait_for_comes_when_either_has_the_turn() -> None:
    flood = [("flood", digest) for digest in ("a1", "b1", "c1", "d1", "e1")]
    assert flooded(True, *flood, ("quiet", "e1"), ("quiet", "x1")) == ["a1", "b1", "e1", "c1", "x1", "d1"]


def test_tenants_are_granted_room_in_turn_and_keep_their_turn_until_they_have_it(bench: Bench) -> None:
    busy = bench.request("a3")
    bench.settle(lambda: bench.granted == [busy])
    bench.residency._looks.sizes |= {"b4": 4 * UNIT, "c4": 4 * UNIT, "d4": 4 * UNIT, "x1": UNIT}
    flood = [bench.ask(digest, tenant="flood").mix for digest in ("b4", "c4", "d4")]
    quiet = bench.ask("x1", tenant="quiet").mix
    bench.settle(bench.is_prepared)
    assert bench.granted == [busy], "there would be room for the small one, but it is not its turn"
    bench.now = STARVING + 1
    bench.request("a3")
    bench.residency.release(busy)
    late = [bench.ask("a3", tenant=tenant).mix for tenant in ("quiet", "other")]
    assert bench.granted == [busy, busy], "drained for the first one, whoever comes"
    bench.gone = {*flood, quiet, *late}
    bench.residency.release(busy)
    bench.settle(lambda: len(bench.granted) == 8)
    assert bench.granted == [busy, busy, flood[0], quiet, late[1], flood[1], late[0], flood[2]]


def test_those_who_wait_for_room_are_fetched_in_their_order(bench: Bench) -> None:
    """As far as host memory goes. Who is there, or is waited for, need not go for it; nothing else changes."""
    bench.source.host_room = 3
    busy = bench.request("a4")
    bench.settle(lambda: bench.granted == [busy])
    assert bench.source.begun == [], "nobody waits"
    mixes = [bench.request(digest) for digest in ("b1", "c2", "d1", "e1")]
    bench.settle(bench.is_prepared)
    assert [digest for digest, _ in bench.source.fetched] == bench.source.begun == ["b1", "c2"]
    assert bench.source.fetched[-1][1] == {"a4", "b1", "c2", "d1", "e1"}
    assert bench.source.loaded == ["a4"]
    bench.residency.release(busy)
    bench.settle(lambda: bench.granted == [busy, *mixes[:3]])
    assert bench.source.loaded == ["a4", "b1", "c2", "d1"]


def test_once_host_memory_is_full_nothing_is_fetched_before_somebody_s_turn(bench: Bench) -> None:
    busy = bench.request("a4")
    bench.settle(lambda: bench.granted == [busy])
    first = bench.request("b4")
    bench.settle(bench.is_prepared)
    bench.source.host_room = 9
    for digest in ("c1", "d1"):
        bench.request(digest)
    bench.settle(bench.is_prepared)
    assert bench.source.begun == []
    bench.residency.release(busy)
    bench.settle(lambda: first in bench.granted and bench.is_prepared())
    assert bench.source.begun == ["c1", "d1"]


def begun(bench: Bench, digest: str) -> None:
    bench.settle(lambda: bench.residency._ahead._job is not None and bench.residency._ahead._job.digest == digest)
    eventually(lambda: digest in bench.source.begun)


def wait_for_c1(bench: Bench) -> Ticket:
    """One unit is free; `b3` waits for room and has been fetched; behind it `c1` is being."""
    bench.source.host_room = 9
    bench.source.gates["fetch c1"] = threading.Event()
    bench.request("a3")
    bench.settle(lambda: len(bench.granted) == 1)
    bench.request("b3")
    ticket = bench.ask("c1")
    begun(bench, "c1")
    return ticket


def test_what_is_being_fetched_gives_way_to_a_load(bench: Bench) -> None:
    wait_for_c1(bench)
    bench.residency.release(bench.granted[0])
    bench.settle(lambda: len(bench.granted) == 3)
    assert bench.source.loaded == ["a3", "b3", "c1"]
    assert [digest for digest, _ in bench.source.fetched] == ["b3"]


def test_what_is_being_fetched_goes_on_when_its_own_load_is_next(bench: Bench) -> None:
    bench.source.host_room = 9
    bench.source.gates["fetch b3"] = threading.Event()
    bench.request("a3")
    bench.settle(lambda: len(bench.granted) == 1)
    bench.request("b3")
    begun(bench, "b3")
    bench.residency.release(bench.granted[0])
    assert bench.residency.pins()["b3"] == (3 * UNIT, 1, False)
    bench.source.gates["fetch b3"].set()
    bench.settle(lambda: len(bench.granted) == 2)
    assert [digest for digest, _ in bench.source.fetched] == ["b3"]


def test_what_nobody_waits_for_any_more_is_not_fetched(bench: Bench) -> None:
    ticket = wait_for_c1(bench)
    bench.request("d1")
    bench.residency.cancel(ticket)
    bench.settle(bench.is_prepared)
    assert [digest for digest, _ in bench.source.fetched] == ["b3", "d1"]


def test_what_cannot_be_fetched_is_left_to_its_load(bench: Bench) -> None:
    bench.source.host_room = 9
    bench.source.broken = {"c1"}
    busy = bench.request("a4")
    bench.settle(lambda: bench.granted == [busy])
    for digest in ("b1", "c1", "d1"):
        bench.request(digest)
    bench.settle(bench.is_prepared)
    assert [digest for digest, _ in bench.source.fetched] == ["b1", "d1"]
    assert not bench.refused


def test_what_was_read_for_a_load_is_forgotten_when_it_has_ended(bench: Bench) -> None:
    bench.source.gates["a1"] = threading.Event()
    bench.request("a1")
    bench.settle(lambda: "a1" in bench.residency.pins())
    bench.now = STARVING + 1
    bench.request("a1")
    assert bench.source.forgotten == [], "it has its room, and its turn will come"
    bench.source.gates["a1"].set()
    bench.settle(lambda: len(bench.granted) == 2)
    assert bench.source.forgotten == ["a1"]


@pytest.mark.parametrize("end", ["gone", "late", "refused"])
def test_what_was_read_for_a_load_that_will_not_follow_soon_is_forgotten(bench: Bench, end: str) -> None:
    busy = bench.request("a4")
    bench.settle(lambda: bench.granted == [busy])
    ticket = bench.ask("b1", *(["unknown1"] if end == "refused" else []))
    bench.settle(bench.is_prepared)
    if end != "refused":
        bench.request("c1")
        assert bench.source.forgotten == ["a4"]
    if end == "gone":
        bench.residency.cancel(ticket)
    bench.now = STARVING + 1 if end == "late" else 0.0
    bench.request("d1")
    assert bench.source.forgotten == ["a4", "b1"]


def test_random_traffic_never_exceeds_the_budget_nor_forgets_anyone() -> None:
    for seed in range(20):
        rng = random.Random(seed)
        bench = Bench(units=6)
        bench.source.broken = {"e1"}

        def settle_one(bench: Bench = bench) -> None:
            bench.posted.get(timeout=60)()
            assert bench.residency.used_bytes <= bench.residency.budget_bytes

        def give_back(rng: random.Random = rng, bench: Bench = bench) -> None:
            bench.residency.release(bench.granted.pop(rng.randrange(len(bench.granted))))

        for _ in range(60):
            before = len(bench.granted)
            bench.source.host_room = rng.randint(0, 4)
            digests = rng.sample(["a1", "b2", "c3", "d1", "e1", "f2"], rng.randint(1, 2))
            ticket = bench.ask(*digests, tenant=rng.choice(["one", "two", "three"]))
            mix = ticket.mix
            if rng.random() < 0.1:
                bench.residency.cancel(ticket)
            if len(bench.granted) > before and rng.random() < 0.5:
                give_back()
            if rng.random() < 0.3:
                bench.residency.drop(mix.parts[0][0])
        for _ in range(10_000):
            loading = any(slot.expert is None for slot in bench.residency._slots.values())
            busy = loading or bench.residency._looks.under_way or not bench.posted.empty()
            if bench.residency._queue.first is None and not busy:
                break
            while bench.granted:
                give_back()
            if busy:
                settle_one()
        while bench.granted:
            give_back()
        assert bench.residency._queue.first is None
        assert all(slot.pins == 0 for slot in bench.residency._slots.values())
        bench.residency.close()
