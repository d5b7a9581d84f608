"""The snapshot finds the nearest centres, whatever the history of its experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.features import Features
from router.index import BACKGROUND, LEAST_REACH, Entry, Snapshot
from tests.router.world import entry, feature, plain_metric

TOPICS = ("cron", "french", "spam", "poems")
ENTRIES = [entry(topic) for topic in TOPICS]


def build(entries: Sequence[Entry], *, quantile: float = 0.98, margin: float = 1.0) -> Snapshot:
    metric = plain_metric(entries) if entries else None
    return Snapshot(entries, metric, None, quantile=quantile, margin=margin)


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
    both = Snapshot([*ENTRIES, alias], plain_metric(ENTRIES), None, quantile=0.98, margin=1.0)
    assert len(both) == len(ENTRIES)
    (plain,) = build(ENTRIES).search(feature("cron 7"), 1)
    assert both.search(feature("cron 7"), 1) == (dataclasses.replace(plain, name="alias"),)
    assert len(build([*ENTRIES, entry("cron", 30, name="other exemplars")])) == len(ENTRIES) + 1


def _reach(entries: Sequence[Entry], text: str) -> float:
    return build(entries).search(feature(text), 1)[0].reach


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
    others = sorted(_reach(entries, f"{topic} 7") for topic in TOPICS)
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


def test_neighbours_show_an_exemplar_of_their_own() -> None:
    for neighbour in build(ENTRIES).search(feature("cron 7"), 40):
        assert neighbour.exemplar.startswith(neighbour.name)
        assert neighbour.centres == 20


@settings(deadline=None)
@given(st.sets(st.sampled_from(TOPICS)), st.sampled_from(TOPICS), st.integers(0, 5000), st.booleans())
def test_what_is_not_visible_is_as_if_it_were_not_there(
    shown: set[str], topic: str, number: int, with_background: bool
) -> None:
    background = entry("anything", name=BACKGROUND, digest=BACKGROUND) if with_background else None
    metric, query = plain_metric(ENTRIES), feature(f"{topic} {number}")

    def search(entries: Sequence[Entry], **visible: object) -> list[tuple[str, float]]:
        snapshot = Snapshot(entries, metric, background, quantile=0.98, margin=1.0)
        return [(n.name, n.distance) for n in snapshot.search(query, 10, **visible)]  # type: ignore[arg-type]

    among = search(ENTRIES, visible=shown.__contains__)
    alone = search([e for e in ENTRIES if e.name in shown])
    assert [name for name, _ in among] == [name for name, _ in alone]
    assert [distance for _, distance in among] == pytest.approx([distance for _, distance in alone], rel=1e-3, abs=1e-3)


def test_the_background_is_found_and_has_no_end() -> None:
    background = entry("anything", name=BACKGROUND, digest=BACKGROUND)
    snapshot = Snapshot(ENTRIES, plain_metric(ENTRIES), background, quantile=0.98, margin=1.0)
    nearest = snapshot.search(feature("anything 1000"), 1)[0]
    assert nearest.is_background
    assert nearest.reach == float("inf")
    assert len(snapshot) == len(ENTRIES)


def test_what_is_known_is_not_measured_again() -> None:
    metric = plain_metric(ENTRIES)
    first = Snapshot(ENTRIES, metric, None, quantile=0.98, margin=1.0)
    grown = [*ENTRIES, entry("new")]
    kept = Snapshot(grown, metric, None, quantile=0.98, margin=1.0, previous=first)
    fresh = Snapshot(grown, metric, None, quantile=0.98, margin=1.0)
    for topic in (*TOPICS, "new"):
        assert kept.search(feature(f"{topic} 99"), 10) == fresh.search(feature(f"{topic} 99"), 10)
    other = plain_metric(ENTRIES[:1])
    moved = Snapshot(grown, other, None, quantile=0.98, margin=1.0, previous=first)
    assert moved.search(feature("cron 99"), 1) != kept.search(feature("cron 99"), 1)
