"""Centres, spread and reach of one expert."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.features import Features
from router.metric import Standardised
from router.profile import SAMPLE, Profile, fit_profile
from store.errors import SwitchyardError
from tests.router.world import SPREAD, feature, texts


def sample(count: int, start: int = 0) -> Features:
    return np.stack([feature(text) for text in texts("topic", count, start)])


def fit(features: Features) -> Profile:
    return fit_profile(features, centres=20, seed=0)


@pytest.mark.parametrize(("count", "centres"), [(1, 1), (2, 2), (7, 7), (20, 20)])
def test_few_exemplars_are_their_own_centres(count: int, centres: int) -> None:
    profile = fit(sample(count))
    assert len(profile.centres) == centres
    np.testing.assert_array_equal(profile.centres, np.unique(sample(count), axis=0))


def test_many_exemplars_have_as_many_centres_as_asked() -> None:
    profile = fit(sample(100))
    assert 15 <= len(profile.centres) <= 20
    assert profile.exemplars == profile.sizes.sum() == 100
    assert len(profile.deviations) == len(profile.members) == 100
    assert len(fit(sample(500)).deviations) == SAMPLE


def test_one_exemplar_is_not_calibrated() -> None:
    profile = fit(sample(1))
    assert not profile.is_calibrated
    assert not profile.variance.any()


@settings(deadline=None)
@given(order=st.permutations(range(30)), again=st.lists(st.integers(0, 29), max_size=10))
def test_neither_order_nor_repetition_matters(order: list[int], again: list[int]) -> None:
    features = sample(30)
    plain, other = fit(features), fit(features[order + again])
    np.testing.assert_array_equal(plain.centres, other.centres)
    np.testing.assert_array_equal(plain.deviations, other.deviations)
    np.testing.assert_array_equal(plain.members, other.members)
    np.testing.assert_array_equal(features[plain.medoids], features[order + again][other.medoids])
    assert plain.exemplars == other.exemplars == 30


@settings(deadline=None)
@given(
    count=st.integers(2, 60),
    low=st.floats(0.75, 1.0, allow_nan=False),
    high=st.floats(0.75, 1.0, allow_nan=False),
)
def test_reach_grows_with_the_quantile(count: int, low: float, high: float) -> None:
    low, high = sorted((low, high))
    profile = fit(sample(count))
    metric = Standardised.fit([profile.variance])
    assert 0 < profile.reach(metric, low) <= profile.reach(metric, high)


def test_reach_covers_new_prompts_of_the_same_kind() -> None:
    profile = fit(sample(100))
    metric = Standardised.fit([profile.variance])
    fresh = metric.project(sample(400, start=1000))
    distances = np.linalg.norm(fresh[:, None] - metric.project(profile.centres)[None], axis=2).min(axis=1)
    assert (distances <= profile.reach(metric, 0.98)).mean() > 0.93
    assert (distances <= profile.reach(metric, 0.80)).mean() < 0.95


def test_distance_is_about_one_whatever_the_units() -> None:
    """So that thresholds and histograms need not know the base."""
    for units in (1e-3, 1.0, 1e3):
        features = sample(100) * np.float32(units)
        metric = Standardised.fit([fit(features).variance])
        apart = metric.project(features[:50]) - metric.project(features[50:])
        assert np.linalg.norm(apart, axis=1).mean() == pytest.approx(np.sqrt(2), rel=0.15)


def test_variance_is_that_of_the_exemplars() -> None:
    assert fit(sample(150)).variance.mean() == pytest.approx(SPREAD**2, rel=0.1)


def test_left_out_exemplars_measure_the_reach() -> None:
    """The shortcut for a mean without one of its members, against the mean without it."""
    features = np.unique(sample(60), axis=0)
    profile = fit(features)
    metric = Standardised.fit([profile.variance])
    distances = []
    for i, own in enumerate(profile.members):
        centres = []
        for cluster in range(len(profile.centres)):
            rows = [j for j, other in enumerate(profile.members) if other == cluster and j != i]
            if rows:
                centres.append(features[rows].mean(axis=0))
        assert len(centres) >= len(profile.centres) - (profile.sizes[own] == 1)
        distances.append(np.linalg.norm(metric.project(np.stack(centres)) - metric.project(features[i]), axis=1).min())
    expected = float(np.quantile(distances, 0.9, method="higher"))
    assert profile.reach(metric, 0.9) == pytest.approx(expected, rel=1e-3)


def test_large_offsets_survive_half_precision() -> None:
    offset = np.zeros(sample(1).shape[1], np.float32)
    offset[3] = 5000.0
    shifted = fit(sample(100) + offset)
    np.testing.assert_allclose(shifted.variance, fit(sample(100)).variance, rtol=0.02)


def test_large_features_are_kept_in_larger_units() -> None:
    usual, large = fit(sample(50)), fit(sample(50) * np.float32(2.0**20))
    assert usual.unit == 1
    np.testing.assert_allclose(large.points, usual.points * np.float32(2.0**20), rtol=2e-3, atol=2.0**11)
    assert np.isfinite(large.reach(Standardised.fit([large.variance]), 0.98))


def test_features_beyond_comparison_are_refused() -> None:
    with pytest.raises(SwitchyardError, match="too large"):
        fit(sample(5) * np.float32(1e30))
