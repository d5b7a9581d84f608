"""The discriminant: one for the whole library, and one among the candidates."""

from __future__ import annotations

import numpy as np
import pytest

from router.discriminant import Candidates, Discriminant
from router.features import Features
from router.index import Entry, Snapshot
from router.metric import LowRank
from router.profile import Profile, fit_profile
from tests.router.test_metric import profiles, right

WIDTH = 24


def blob(mean: Features, *, count: int = 60, seed: int = 0, spread: float = 1.0) -> Profile:
    noise = np.random.default_rng(seed).normal(size=(count, WIDTH))
    return fit_profile((mean + spread * noise).astype(np.float32), centres=10, seed=0)


def test_it_finds_what_tells_experts_apart() -> None:
    metric = Discriminant.fit(profiles(), 32)
    assert metric.directions.shape == (2, 24)
    assert right(metric) > 0.95
    assert right(metric) > right(LowRank.principal(profiles(), 2))


def test_rank_is_bounded() -> None:
    assert Discriminant.fit(profiles(), 1).directions.shape == (1, 24)


def test_exemplars_of_one_expert_are_about_one_apart() -> None:
    """So that thresholds and histograms need not know the base."""
    fitted = [blob(np.full(WIDTH, k, np.float32), seed=k) for k in range(4)]
    metric = Discriminant.fit(fitted, 3)
    points = metric.project(fitted[0].points)
    assert 0.4 < np.linalg.norm(points[:30] - points[30:], axis=1).mean() < 1.6


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("parts", [1, 5])
def test_hardly_any_exemplars(count: int, parts: int) -> None:
    few = [blob(np.zeros(WIDTH, np.float32), count=count, seed=k) for k in range(2)]
    assert np.isfinite(Discriminant.fit(few, 32, parts=parts).project(few[0].centres)).all()
    assert np.isfinite(Discriminant.fit(few[:1], 32, parts=parts).project(few[0].centres)).all()


def test_the_directions_are_orthonormal() -> None:
    metric = Discriminant.fit([blob(np.zeros(WIDTH, np.float32), seed=k) for k in range(6)], 4, parts=8)
    for rows in (metric.directions, metric.background):
        np.testing.assert_allclose(rows @ rows.T, np.eye(len(rows)), atol=1e-4)


def test_distances_among_candidates_are_those_in_the_span_of_their_means() -> None:
    rng = np.random.default_rng(0)
    fitted = [blob(rng.normal(size=WIDTH).astype(np.float32), seed=k) for k in range(7)]
    metric = Discriminant.fit(fitted, 3, parts=4)
    means = metric.whitened(np.stack([p.mean for p in fitted]))
    centres = metric.whitened(np.concatenate([p.centres for p in fitted]))
    query = metric.whitened(rng.normal(size=(1, WIDTH)).astype(np.float32))[0]
    rows = np.array([0, 3, 12, 61])
    found = Candidates(metric, means, centres).distances(query, [1, 4, 5], rows)
    span = np.linalg.qr(np.vstack([metric.background, means[[1, 4, 5]]]).T)[0]
    wanted = np.linalg.norm((centres[rows] - query) @ span, axis=1) / np.sqrt(2 * span.shape[1])
    np.testing.assert_allclose(found, wanted, rtol=1e-3)


def test_experts_that_differ_in_little_are_told_apart_in_a_large_library() -> None:
    """One direction tells the twins apart, and the library's few directions do not hold it."""
    rng = np.random.default_rng(1)
    place = (4 * rng.normal(size=WIDTH)).astype(np.float32)
    apart = np.zeros(WIDTH, np.float32)
    apart[3] = 2.5
    means = {"twin-a": place, "twin-b": place + apart}
    means |= {f"other-{i}": (6 * rng.normal(size=WIDTH)).astype(np.float32) for i in range(60)}
    entries = [
        Entry(name, name, name, profile := blob(mean, seed=i), ("",) * len(profile.centres))
        for i, (name, mean) in enumerate(means.items())
    ]
    background = Entry("", "", "", blob(np.zeros(WIDTH, np.float32), seed=99, spread=8.0), ("",) * 10)
    profiles_of = [entry.profile for entry in (*entries, background)]

    def share(metric: Discriminant | LowRank) -> float:
        snapshot = Snapshot(entries, metric, background, quantile=0.98, margin=3.0)
        asked = np.random.default_rng(7).normal(size=(60, WIDTH)).astype(np.float32)
        found = [snapshot.search(place + noise, 10)[0].name == "twin-a" for noise in asked]
        found += [snapshot.search(place + apart + noise, 10)[0].name == "twin-b" for noise in asked]
        return float(np.mean(found))

    metric = Discriminant.fit(profiles_of, 2)
    assert share(metric) > share(LowRank(metric.origin, (metric.whiten @ metric.directions.T).T)) + 0.15
