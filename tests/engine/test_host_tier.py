"""Experts in host memory: bytes bound them, readers hold them, what is dropped is found no more."""

from __future__ import annotations

import random

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
def test_random_use_keeps_the_books(seed: int) -> None:
    rng = random.Random(seed)
    tier = HostTier(8 * UNIT)
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
            case 5:
                tier.take(name)
        there = {id(entry.parcel): entry.parcel for entry in tier._entries.values()}
        there |= {id(kept): kept for kept, _ in readers}
        assert tier.used_bytes == sum(kept.nbytes for kept in there.values()) <= 8 * UNIT
    for _, reading in readers:
        reading.__exit__(None, None, None)  # type: ignore[attr-defined]
    assert tier.used_bytes == sum(entry.parcel.nbytes for entry in tier._entries.values())
