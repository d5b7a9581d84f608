"""What one expert's exemplars say about its domain: fitted once, when it is added, and independent of the others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from router.features import Features
from router.metric import Metric, Standardised

LOWEST_QUANTILE = 0.75
"""Thresholds are quantiles above this, so only the farthest quarter of the held-out exemplars has to be kept."""

_KMEANS_ITERATIONS = 20


@dataclass(frozen=True, eq=False)
class Profile:
    """Centres, spread and reach of one expert's exemplars, in the base's own feature space.

    Attributes:
        centres: `[E, e]`, means of the K-Means clusters (AFS §III-C5), E ≤ the exemplars that differ.
        variance: `[e]`, of the exemplars; zeros if there is only one.
        strays: `[s, e]`, how the farthest held-out exemplars differ from the centre nearest to them among centres that
            were fitted without them; `[0, e]` if there is only one exemplar.
        exemplars: how many differ.
    """

    centres: Features
    variance: Features
    strays: Features
    exemplars: int

    @property
    def is_calibrated(self) -> bool:
        """Whether the exemplars tell how far the domain reaches; a single one has nothing to be far from."""
        return self.exemplars > 1

    def reach(self, metric: Metric, quantile: float) -> float:
        """The quantile of the held-out distances under `metric`: that share of the domain's prompts is nearer.

        Call it on a calibrated profile; `quantile` is in [LOWEST_QUANTILE, 1]. It is a distance that occurred, the
        upper one of the two between which the quantile falls.
        """
        distances = np.sort(np.linalg.norm(metric.project(self.strays), axis=1))[::-1]
        last = self.exemplars - 1
        return float(distances[last - math.ceil(quantile * last)])


def fit_profile(features: Features, *, centres: int, folds: int, seed: int) -> Profile:
    """Fit a profile, cross-fitting the held-out distances in `folds` folds.

    The result depends neither on the order of the exemplars nor on repetitions.

    Args:
        features: `[n, e]`, n ≥ 1.
        centres: how many centres to look for (E of AFS, 20 there).
    """
    features = np.unique(features, axis=0)
    n, width = features.shape
    variance = features.var(axis=0, ddof=1) if n > 1 else np.zeros(width, dtype=np.float32)
    # Which exemplars belong together is settled in the expert's own units; the centres are kept in the base's, so
    # that experts added later change the units of a distance but never the centres.
    own = Standardised.fit([variance])
    return Profile(
        centres=_centres(features, own, centres, seed),
        variance=variance,
        strays=_strays(features, own, centres, folds, seed),
        exemplars=n,
    )


def _strays(features: Features, own: Standardised, centres: int, folds: int, seed: int) -> Features:
    """`[n // 4 + 1, e]`: differences of the farthest exemplars from centres fitted on the other folds."""
    n = len(features)
    if n == 1:
        return features[:0]
    differences = np.empty_like(features)
    for held in np.array_split(np.random.default_rng(seed).permutation(n), min(folds, n)):
        others = _centres(np.delete(features, held, axis=0), own, centres, seed)
        _, nearest = _flat(own.project(others)).search(own.project(features[held]), 1)
        differences[held] = features[held] - others[nearest[:, 0]]
    order = np.argsort(-np.linalg.norm(own.project(differences), axis=1), kind="stable")
    return differences[order[: n // 4 + 1]]


def _centres(features: Features, own: Standardised, count: int, seed: int) -> Features:
    """`[min(count, n), e]` or fewer where a cluster stays empty: the mean of each K-Means cluster."""
    if len(features) <= count:
        return features
    points = own.project(features)
    # faiss works on a hundred points: threads of its own would only get in the way of the engine's.
    faiss.omp_set_num_threads(1)
    kmeans = faiss.Kmeans(
        points.shape[1], count, niter=_KMEANS_ITERATIONS, seed=seed, min_points_per_centroid=1, verbose=False
    )
    kmeans.train(points)
    members: npt.NDArray[np.int64] = kmeans.index.search(points, 1)[1][:, 0]
    return np.stack([features[members == cluster].mean(axis=0) for cluster in np.unique(members)])


def _flat(points: Features) -> Any:
    faiss.omp_set_num_threads(1)
    index = faiss.IndexFlatL2(points.shape[1])
    index.add(points)
    return index
