"""What one expert's exemplars say about its domain: fitted once, when it is added, and independent of the others."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from router.clusters import clusters
from router.features import Features
from router.metric import Metric, Standardised
from store.errors import SwitchyardError

LOWEST_QUANTILE = 0.75
"""Least share of its own exemplars that an expert's reach may include."""

SAMPLE = 192
"""Most exemplars whose features are kept to measure distances by."""

_LARGEST = 1e15
"""Of features: sums of their squares are finite in float32, however many dimensions there are."""
_EXPONENT = 15
"""Numbers below 2 to this power are finite in float16."""


@dataclass(frozen=True, eq=False)
class Profile:
    """Centres and a sample of one expert's exemplars, in the base's own feature space.

    Attributes:
        mean: `[e]`, of the exemplars.
        centres: `[E, e]`, means of the K-Means clusters (AFS §III-C5), E ≤ the exemplars that differ.
        sizes: `[E]` int64, how many exemplars each centre is the mean of.
        deviations: `[s, e]` float16, features of at most SAMPLE exemplars less `mean`, in units of `unit`. Some
            dimensions of hidden states are hundreds of times as large as their spread, which float16 would round away.
        unit: a power of two, 1 unless deviations are too large for float16.
        members: `[s]` int64, the centre that each of them is part of.
        medoids: `[E]` int64, the row nearest to each centre in the features the profile was fitted on.
        exemplars: how many differ.
    """

    mean: Features
    centres: Features
    sizes: npt.NDArray[np.int64]
    deviations: npt.NDArray[np.float16]
    unit: np.float32
    members: npt.NDArray[np.int64]
    medoids: npt.NDArray[np.int64]
    exemplars: int

    @property
    def is_calibrated(self) -> bool:
        """Whether the exemplars tell how far the domain reaches; a single one has nothing to be far from."""
        return self.exemplars > 1

    @property
    def points(self) -> Features:
        """`[s, e]`, the kept exemplars."""
        return self.mean + self.spread

    @property
    def spread(self) -> Features:
        """`[s, e]`, the kept exemplars less `mean`."""
        return self.deviations.astype(np.float32) * self.unit

    @cached_property
    def variance(self) -> Features:
        """`[e]`, of the exemplars; zeros if there is only one."""
        variance: Features = (self.spread**2).sum(axis=0) / max(1, len(self.deviations) - 1)
        return variance

    def reach(self, metric: Metric, quantile: float) -> float:
        """The quantile of the exemplars' distances to the nearest centre: that share of the domain's prompts is nearer.

        Each exemplar counts as if it had been left out of its centre: with n members, a mean without x is
        n / (n - 1) times as far from x as the mean with it; a centre of x alone would not be there.
        Call it on a calibrated profile; `quantile` is in [LOWEST_QUANTILE, 1]. It is a distance that occurred, the
        upper one of the two between which the quantile falls.
        """
        points = metric.project(self.points)
        distances = np.linalg.norm(points[:, None] - metric.project(self.centres)[None], axis=2)
        sizes = self.sizes[self.members]
        with np.errstate(divide="ignore", invalid="ignore"):
            own = np.where(sizes > 1, distances[np.arange(len(points)), self.members] * (sizes / (sizes - 1)), np.inf)
        distances[np.arange(len(points)), self.members] = own
        return float(np.quantile(distances.min(axis=1), quantile, method="higher"))


def fit_profile(features: Features, *, centres: int, seed: int) -> Profile:
    """Fit a profile. But for `medoids`, it depends neither on the order of the exemplars nor on repetitions.

    Args:
        features: `[n, e]`, n ≥ 1.
        centres: how many centres to look for (E of AFS, 20 there).

    Raises:
        SwitchyardError: the features are so large that distances overflow.
    """
    rows, first = np.unique(features, axis=0, return_index=True)
    n, width = rows.shape
    mean = rows.mean(axis=0)
    if not np.abs(rows).max() < _LARGEST:
        raise SwitchyardError("the base gives routing features that are too large to compare")
    # Which exemplars belong together is settled in the expert's own units; the centres are kept in the base's, so
    # that experts added later change the units of a distance but never the centres.
    variance = rows.var(axis=0, ddof=1) if n > 1 else np.zeros(width, dtype=np.float32)
    points = Standardised.fit([variance]).project(rows)
    members = clusters(points, centres, seed)
    means = np.stack([rows[members == cluster].mean(axis=0) for cluster in range(members.max() + 1)])
    projected = np.stack([points[members == cluster].mean(axis=0) for cluster in range(len(means))])
    kept = np.unique(np.linspace(0, n - 1, min(n, SAMPLE)).round().astype(np.int64))
    deviations = rows[kept] - mean
    unit = np.float32(2.0 ** max(0, int(np.frexp(np.abs(deviations).max())[1]) - _EXPONENT))
    return Profile(
        mean=mean,
        centres=means,
        sizes=np.bincount(members),
        deviations=(deviations / unit).astype(np.float16),
        unit=unit,
        members=members[kept],
        medoids=first[_flat(points).search(projected, 1)[1][:, 0]],
        exemplars=n,
    )


def _flat(points: Features) -> Any:
    faiss.omp_set_num_threads(1)
    index = faiss.IndexFlatL2(points.shape[1])
    index.add(points)
    return index
