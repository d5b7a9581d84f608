"""Auto-FlexSwitch's metric (AFS §III-C5, Eq. 19): L trained so that a prompt's near centres are its own expert's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from router.features import Features
from router.metric import LowRank
from router.profile import Profile

EPSILON = 1e-6
"""Added to distances: an exemplar that is its own centre is at distance 0."""

LEARNING_RATE = 0.01
"""Of Adam. The paper's 0.5 is for features of another size than standardised ones."""
_BETA1, _BETA2, _TINY = 0.9, 0.999, 1e-8

Labels = npt.NDArray[np.int64]


def flex_metric(profiles: Sequence[Profile], *, rank: int, neighbours: int, epochs: int) -> LowRank:
    """Train L on the exemplars of all profiles, full batch, neighbours found anew under the current L in each epoch."""
    start = LowRank.principal(profiles, rank)
    # Trained in units in which dimensions are alike: Adam's steps are of one size in all of them.
    scale = np.sqrt((start.matrix**2).sum(axis=0)) + np.float32(EPSILON)
    points = (np.concatenate([profile.points for profile in profiles]) - start.origin) * scale
    centres = (np.concatenate([profile.centres for profile in profiles]) - start.origin) * scale
    labels = np.repeat(np.arange(len(profiles)), [len(profile.deviations) for profile in profiles])
    owners = np.repeat(np.arange(len(profiles)), [len(profile.centres) for profile in profiles])
    matrix = start.matrix / scale
    first, second = np.zeros_like(matrix), np.zeros_like(matrix)
    for step in range(1, epochs + 1):
        _, gradient = loss_and_gradient(matrix, points, labels, centres, owners, neighbours)
        first = _BETA1 * first + (1 - _BETA1) * gradient
        second = _BETA2 * second + (1 - _BETA2) * gradient**2
        ahead = first / (1 - _BETA1**step) / (np.sqrt(second / (1 - _BETA2**step)) + _TINY)
        matrix = matrix - np.float32(LEARNING_RATE) * ahead
    return LowRank(start.origin, (matrix * scale).astype(np.float32))


def loss_and_gradient(
    matrix: Features, points: Features, labels: Labels, centres: Features, owners: Labels, neighbours: int
) -> tuple[float, Features]:
    """The loss, −mean log (Σ own 1/d ÷ Σ all 1/d) over each point's nearest centres, and its gradient.

    A point none of whose neighbours is its own expert's counts its nearest own centre as one more neighbour.

    Args:
        matrix: `[r, e]`.
        points, centres: `[n, e]` and `[m, e]`.
        labels, owners: `[n]` and `[m]`, the expert of each; every label has a centre.
        neighbours: C.

    Returns:
        The loss, and `[r, e]`.
    """
    u, v = points @ matrix.T, centres @ matrix.T
    squares = (u**2).sum(axis=1)[:, None] - 2 * u @ v.T + (v**2).sum(axis=1)[None]
    lengths = np.sqrt(np.maximum(squares, 0))
    distances = lengths + EPSILON
    own = owners[None] == labels[:, None]
    rows = np.arange(len(points))
    chosen = np.zeros_like(own)
    count = min(neighbours, len(centres))
    chosen[rows[:, None], np.argpartition(distances, count - 1, axis=1)[:, :count]] = True
    lost = ~(chosen & own).any(axis=1)
    chosen[rows[lost], np.where(own, distances, np.inf).argmin(axis=1)[lost]] = True
    inverse = np.where(chosen, 1 / distances, 0)
    total = inverse.sum(axis=1, keepdims=True)
    mine = (inverse * own).sum(axis=1, keepdims=True)
    loss = float(-np.log(mine / total).mean())
    # ∂loss/∂d = (own/mine − 1/total) / (d + ε)², ∂d/∂L = L(x − z)(x − z)ᵀ / d: summed over all pairs by four products.
    weights = (own / mine - 1 / total) * inverse**2 / np.maximum(lengths, EPSILON) / len(points)
    gradient = (
        (u * weights.sum(axis=1)[:, None]).T @ points
        - u.T @ (weights @ centres)
        - (weights @ v).T @ points
        + (v * weights.sum(axis=0)[:, None]).T @ centres
    )
    return loss, gradient.astype(matrix.dtype)
