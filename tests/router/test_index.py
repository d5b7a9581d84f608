"""The snapshot finds the nearest centres, whatever the history of its experts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.features import Features
from router.index import LEAST_REACH, Entry, Neighbour, Snapshot
from tests.router.world import entry, feature

TOPICS = ("cron", "french", "spam", "poems")
ENTRIES = [entry(topic) for topic in TOPICS]


def build(entries: Sequence[Entry], *, quantile: float = 0.98, margin: float = 1.0) -> Snapshot:
    return Snapshot(entries, quantile=quantile, margin=margin)


def test_nothing_is_found_where_nothing_is() -> None:
    empty = build([])
    assert len(empty) == 0
    assert empty.search(feature("cron"), 10) == ()


def test_search_is_exact() -> None:
    variance = np.stack([e.profile.variance for e in ENTRIES]).astype(np.float64).mean(axis=0)
    scale = 1 / np.sqrt((variance + 0.1 * variance.mean()) * len(variance))
    query = feature("cron 1000")
    expected = sorted(
        (float(np.linalg.norm((centre - query) * scale)), e.name) for e in ENTRIES for centre in e.profile.centres
    )[:10]
    found = build(ENTRIES).search(query, 10)
    assert [n.name for n in found] == [name for _, name in expected]
    assert [n.distance for n in found] == pytest.approx([distance for distance, _ in expected], rel=1e-3)


@settings(deadline=None)
@given(st.permutations(ENTRIES), st.sampled_from(TOPICS), st.integers(0, 5000))
def test_order_does_not_matter(entries: list[Entry], topic: str, number: int) -> None:
    query = feature(f"{topic} {number}")
    assert build(entries).search(query, 10) == build(ENTRIES).search(query, 10)


def test_fewer_centres_than_asked_for() -> None:
    found = build([entry("cron", 3), entry("spam", 1)]).search(feature("cron 9"), 10)
    assert [n.name for n in found] == ["cron", "cron", "cron", "spam"]
    assert [n.distance for n in found] == sorted(n.distance for n in found)


def test_an_alias_does_not_vote_twice() -> None:
    alias = entry("cron", name="alias")
    both = build([*ENTRIES, alias])
    assert len(both) == len(ENTRIES)
    assert both.search(feature("cron 7"), 1)[0] == Neighbour("alias", "digest-cron", *_measures(ENTRIES, "cron 7"))
    assert len(build([*ENTRIES, entry("cron", 30, name="other exemplars")])) == len(ENTRIES) + 1


def _measures(entries: Sequence[Entry], text: str) -> tuple[float, float]:
    nearest = build(entries).search(feature(text), 1)[0]
    return nearest.distance, nearest.reach


@settings(deadline=None)
@given(margins=st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), quantiles=st.tuples(*[st.floats(0.75, 1.0)] * 2))
def test_reach_grows_with_margin_and_quantile(margins: tuple[float, float], quantiles: tuple[float, float]) -> None:
    query = feature("cron 7")
    small = build(ENTRIES, margin=min(margins), quantile=min(quantiles)).search(query, 10)
    large = build(ENTRIES, margin=max(margins), quantile=max(quantiles)).search(query, 10)
    assert [n.distance for n in small] == [n.distance for n in large]
    assert all(s.reach <= g.reach for s, g in zip(small, large, strict=True))


def test_a_single_exemplar_borrows_its_reach() -> None:
    entries = [*ENTRIES, entry("lonely", 1)]
    lonely = build(entries).search(feature("lonely 0"), 1)[0]
    others = sorted(_measures(entries, f"{topic} 7")[1] for topic in TOPICS)
    assert lonely.name == "lonely"
    assert lonely.distance == pytest.approx(0, abs=1e-3)
    assert lonely.reach == pytest.approx((others[1] + others[2]) / 2)


def test_a_single_exemplar_alone_reaches_only_itself() -> None:
    alone = build([entry("lonely", 1)])
    assert alone.search(feature("lonely 0"), 10)[0].is_within_reach
    other = alone.search(feature("lonely 5"), 10)[0]
    assert other.reach == LEAST_REACH
    assert not other.is_within_reach


def test_features_that_differ_by_rounding_are_the_same() -> None:
    """The engine's batches change the last bits of a feature; an exemplar must be at home with itself."""
    rng = np.random.default_rng(0)
    for entries in ([entry("lonely", 1)], [entry("pair", 2)]):
        known = entries[0].profile.centres[0]
        noisy: Features = known * (1 + 1e-5 * rng.normal(size=known.shape)).astype(np.float32)
        assert build(entries).search(noisy, 1)[0].is_within_reach
