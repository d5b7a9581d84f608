"""Learned metrics: the gradient against autograd, and what they are there for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from router.features import Features
from router.flex import EPSILON, Labels, flex_metric, loss_and_gradient
from router.metric import LowRank
from router.profile import Profile, fit_profile


def reference(
    matrix: torch.Tensor, points: Features, labels: Labels, centres: Features, owners: Labels, neighbours: int
) -> torch.Tensor:
    """AFS Eq. 19, row by row."""
    losses = []
    for x, label in zip(points, labels, strict=True):
        distances = torch.stack([(matrix @ torch.from_numpy(x - z)).norm() for z in centres]) + EPSILON
        near = set(distances.argsort()[:neighbours].tolist())
        own = [j for j in range(len(centres)) if owners[j] == label]
        if not near & set(own):
            near.add(min(own, key=lambda j: float(distances[j].detach())))
        losses.append(-torch.log((1 / distances[sorted(near & set(own))]).sum() / (1 / distances[sorted(near)]).sum()))
    return torch.stack(losses).mean()


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(2, 4), st.integers(1, 12))
def test_the_gradient_is_that_of_autograd(seed: int, rank: int, experts: int, neighbours: int) -> None:
    rng = np.random.default_rng(seed)
    points, centres = rng.normal(size=(9, 5)), rng.normal(size=(3 * experts, 5))
    labels, owners = rng.integers(experts, size=9), np.repeat(np.arange(experts), 3)
    matrix = torch.from_numpy(rng.normal(size=(rank, 5))).requires_grad_()
    projected = (torch.from_numpy(data) @ matrix.detach().T for data in (points, centres))
    assume(float(torch.cdist(*projected).min()) > 1e-4)  # closer, u² − 2uv + v² has no digits left
    expected = reference(matrix, points, labels, centres, owners, neighbours)
    expected.backward()
    loss, gradient = loss_and_gradient(matrix.detach().numpy(), points, labels, centres, owners, neighbours)
    assert matrix.grad is not None
    assert loss == pytest.approx(float(expected.detach()), rel=1e-6, abs=1e-9)
    np.testing.assert_allclose(gradient, matrix.grad.numpy(), rtol=1e-4, atol=1e-7)


def profiles(shift: float = 1.0, count: int = 60) -> list[Profile]:
    """Three experts that differ in one dimension of 24, and spread in the others, in some of them much."""
    rng = np.random.default_rng(0)
    spread = np.geomspace(1, 3, 24)
    made = []
    for k in range(3):
        features = rng.normal(size=(count, 24)) * spread
        features[:, 5] = shift * k + 0.1 * rng.normal(size=count)
        made.append(fit_profile((features + 300).astype(np.float32), centres=10, seed=0))
    return made


def right(metric: LowRank) -> float:
    """Share of fresh prompts whose nearest centre is their own expert's."""
    fitted = profiles()
    rng = np.random.default_rng(1)
    spread = np.geomspace(1, 3, 24)
    centres = [metric.project(profile.centres) for profile in fitted]
    hits = 0
    for k in range(3):
        features = rng.normal(size=(50, 24)) * spread
        features[:, 5] = k + 0.1 * rng.normal(size=50)
        points = metric.project((features + 300).astype(np.float32))
        nearest = [np.linalg.norm(points[:, None] - own[None], axis=2).min(axis=1) for own in centres]
        hits += int((np.argmin(nearest, axis=0) == k).sum())
    return hits / 150


def test_rank_is_bounded() -> None:
    assert LowRank.principal(profiles(), 7).matrix.shape == (7, 24)


def test_training_lowers_the_loss() -> None:
    given_profiles = profiles()
    start = LowRank.principal(given_profiles, 6)
    trained = flex_metric(given_profiles, rank=6, neighbours=10, epochs=60)
    assert trained.matrix.shape == start.matrix.shape
    assert right(trained) > right(start)


@pytest.mark.parametrize("count", [1, 2])
def test_hardly_any_exemplars(count: int) -> None:
    few = [fit_profile(np.random.default_rng(k).normal(size=(count, 8)).astype(np.float32), centres=5, seed=0)
           for k in range(2)]  # fmt: skip
    assert np.isfinite(flex_metric(few, rank=32, neighbours=10, epochs=2).matrix).all()
