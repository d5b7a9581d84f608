"""Experts in host memory: bytes bound them, readers hold them, what is dropped is found no more."""

from __future__ import annotations

import random
import threading

import pytest
import torch

from server.engine.host_tier import HostTier
from server.engine.parcel import Parcel, checksum

UNIT = 64


def parcel(name: str, units: int = 1) -> Parcel:
    buffer = torch.zeros(units * UNIT, dtype=torch.uint8)
    return Parcel(name, buffer, checksum(buffer), {})


def held(tier: HostTier, *names: str) -> list[bool]:
    found = []
    for name in names:
        with tier.reading(name) as kept:
            found.append(kept is not None)
    return found


class Runtime:
    """CUDA's, as far as it locks pages. As there, an error stays with the thread that met it."""

    def __init__(self, status: int = 0) -> None:
        self.status = status
        self.locked: set[int] = set()
        self.threads: set[int] = set()
        self.errors = threading.local()
        self.asked, self.go = threading.Event(), threading.Event()

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.asked.set()
        assert self.go.wait(60)
        assert address not in self.locked
        self.threads.add(threading.get_ident())
        if self.status:
            self.errors.last = self.status
        else:
            self.locked.add(address)
        return self.status

    def cudaHostUnregister(self, address: int) -> int:
        self.locked.remove(address)
        self.threads.add(threading.get_ident())
        return 0

    def launch(self) -> None:
        """What torch does after each of its kernels."""
        if getattr(self.errors, "last", 0):
            raise RuntimeError(f"CUDA error {self.errors.last}")


def test_the_least_recently_used_goes_first() -> None:
    tier = HostTier(3 * UNIT)
    for name in "abc":
        assert tier.put(parcel(name), 0.5)
    tier.touch("a")
    assert tier.put(parcel("d"), 0.5)
    assert held(tier, *"abcd") == [True, False, True, True]
    stats = tier.stats()
    assert (stats.used_bytes, stats.limit_bytes, stats.experts) == (3 * UNIT, 3 * UNIT, 3)
    assert (stats.loads, stats.evictions, stats.hits, stats.misses, stats.load_seconds) == (4, 1, 3, 1, 2.0)


def test_what_is_being_read_stays() -> None:
    tier = HostTier(2 * UNIT)
    tier.put(parcel("a"), 0)
    tier.put(parcel("b"), 0)
    with tier.reading("a") as a, tier.reading("b"):
        assert a is not None
        assert not tier.put(parcel("c"), 0), "and nobody is thrown out in vain"
        assert tier.stats().experts == 2
    assert tier.put(parcel("c", 2), 0)
    assert held(tier, *"abc") == [False, False, True]
    assert not tier.put(parcel("d", 3), 0)


def test_what_is_spared_stays_and_the_rest_is_room() -> None:
    tier = HostTier(4 * UNIT)
    for name in "abc":
        tier.put(parcel(name), 0)
    assert tier.room("a") == 3 * UNIT
    with tier.reading("b"):
        assert tier.room("a") == 2 * UNIT
    assert not tier.put(parcel("d", 4), 0, spared="a")
    assert tier.put(parcel("d", 3), 0, spared="a")
    assert held(tier, *"abcd") == [True, False, False, True]


def test_what_is_dropped_is_found_no_more_and_freed_with_its_last_reader() -> None:
    tier = HostTier(3 * UNIT)
    tier.put(parcel("a", 2), 0)
    with tier.reading("a"):
        with tier.reading("a"):
            tier.drop("a")
            assert held(tier, "a") == [False]
        assert tier.used_bytes == 2 * UNIT
        assert not tier.put(parcel("b", 2), 0)
        assert tier.put(parcel("a"), 0), "a new copy of the same one is another one"
    assert tier.used_bytes == UNIT
    assert held(tier, "a") == [True]
    tier.close()
    assert tier.used_bytes == 0


def test_what_is_taken_is_the_taker_s() -> None:
    tier = HostTier(2 * UNIT)
    first = parcel("a", 2)
    tier.put(first, 0)
    assert tier.take("a") is first
    assert tier.take("a") is None
    assert tier.used_bytes == 0
    assert (tier.stats().hits, tier.stats().misses) == (1, 1)


def test_without_a_limit_above_zero_nothing_is_kept() -> None:
    tier = HostTier(0)
    assert not tier.put(parcel("a"), 0)
    assert held(tier, "a") == [False]
    assert tier.stats().misses == 0, "a tier that is not there is not asked"


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("page_locked", [False, True])
def test_random_use_keeps_the_books(seed: int, page_locked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    runtime = Runtime()
    runtime.go.set()
    monkeypatch.setattr("server.engine.pinning._runtime", lambda: runtime)
    tier = HostTier(8 * UNIT, page_locked=page_locked)
    readers: list[tuple[Parcel, object]] = []
    for _ in range(300):
        name = rng.choice("abcdefgh")
        match rng.randrange(6):
            case 0 | 1:
                tier.put(parcel(name, ord(name) % 4 + 1), 0)
            case 2:
                reading = tier.reading(name)
                kept = reading.__enter__()
                if kept is None:
                    reading.__exit__(None, None, None)
                else:
                    readers.append((kept, reading))
            case 3 if readers:
                readers.pop(rng.randrange(len(readers)))[1].__exit__(None, None, None)  # type: ignore[attr-defined]
            case 4:
                tier.drop(name)
            case 5 if not page_locked:  # nobody takes what a GPU copies from
                tier.take(name)
        tier.settle()
        there = {id(entry.parcel): entry.parcel for entry in tier._entries.values()}
        there |= {id(kept): kept for kept, _ in readers}
        assert tier.used_bytes == sum(kept.nbytes for kept in there.values()) <= 8 * UNIT
        assert {name for name in "abcdefgh" if tier.is_locked(name)} == (set(tier._entries) if page_locked else set())
        if page_locked:
            assert runtime.locked == {kept.buffer.data_ptr() for kept in there.values()}
    for _, reading in readers:
        reading.__exit__(None, None, None)  # type: ignore[attr-defined]
    assert tier.used_bytes == sum(entry.parcel.nbytes for entry in tier._entries.values())
    tier.close()
    assert not runtime.locked
    assert tier.used_bytes == 0


def locking(monkeypatch: pytest.MonkeyPatch, runtime: Runtime) -> HostTier:
    monkeypatch.setattr("server.engine.pinning._runtime", lambda: runtime)
    return HostTier(3 * UNIT, page_locked=True)


def test_nobody_waits_for_pages_to_be_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime()
    tier = locking(monkeypatch, runtime)
    first, second = parcel("a"), parcel("b")
    assert tier.put(first, 0)
    assert tier.put(second, 0)
    assert held(tier, "a", "b") == [True, True], "read while the first one's pages are being locked"
    tier.drop("b")
    assert held(tier, "b") == [False]
    assert tier.used_bytes == 2 * UNIT, "its memory is there for as long as it may be locked"
    runtime.go.set()
    tier.settle()
    assert runtime.locked == {first.buffer.data_ptr()}, "and what is gone is not locked any more"
    assert tier.used_bytes == UNIT
    tier.drop("a")
    tier.settle()
    assert not runtime.locked
    assert len(runtime.threads) == 1
    assert threading.get_ident() not in runtime.threads
    tier.close()


def test_an_expert_whose_pages_are_being_locked_at_the_end_is_unlocked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime()
    tier = locking(monkeypatch, runtime)
    tier.put(parcel("a"), 0)
    assert runtime.asked.wait(60)
    tier.drop("a")
    runtime.go.set()
    tier.close()
    assert not runtime.locked
    assert tier.used_bytes == 0


def test_pages_are_unlocked_with_the_last_reader_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime()
    runtime.go.set()
    tier = locking(monkeypatch, runtime)
    first, second, third = parcel("a", 2), parcel("b"), parcel("c", 2)
    tier.put(first, 0)
    tier.put(second, 0)
    tier.settle()
    with tier.reading("a"):
        tier.drop("a")
        tier.settle()
        assert first.buffer.data_ptr() in runtime.locked
    tier.settle()
    assert runtime.locked == {second.buffer.data_ptr()}
    tier.put(third, 0)
    tier.put(parcel("d"), 0)
    assert held(tier, *"abcd") == [False, False, True, True]
    tier.close()
    assert not runtime.locked
    assert tier.used_bytes == 0


def test_memory_that_cannot_be_locked_is_kept_and_its_error_meets_no_kernel(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = Runtime(status=304)
    runtime.go.set()
    tier = locking(monkeypatch, runtime)
    tier.put(parcel("a"), 0)
    tier.settle()
    assert "CUDA error 304" in caplog.text
    assert held(tier, "a") == [True]
    runtime.launch()
    tier.close()
    assert tier.used_bytes == 0
