"""Where distances between features mean something."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

import numpy as np

from router.features import Features

if TYPE_CHECKING:
    from router.profile import Profile

SHRINKAGE = 0.1
"""Share of the mean variance added to each dimension's: among a few exemplars of one template a dimension may hardly
vary, and dividing by next to nothing would let it decide alone."""


SCATTER_SHRINKAGE = 0.5
"""Share of the identity in the scatter within experts: it has e² entries, and a library shows a few hundred texts."""


class MetricKind(StrEnum):
    PLAIN = "plain"
    """Standardised features, without a background: Auto-Switch."""
    DISCRIMINANT = "discriminant"
    """The directions that best tell experts and background apart, in closed form."""
    FLEX = "flex"
    """Auto-FlexSwitch's loss, minimised from the principal components."""


class Metric(Protocol):
    """A linear map; the router compares features by the Euclidean distance of their images."""

    def project(self, features: Features) -> Features:
        """`[n, e]` → `[n, r]` float32."""
        ...


@dataclass(frozen=True, eq=False)
class Standardised:
    """Each dimension in units of its standard deviation, and the distance as the root mean square over dimensions.

    About 1 is then the distance of two features that differ in each dimension as much as exemplars of one expert do,
    whatever the width of the base.

    Attributes:
        scale: `[e]` float32.
    """

    scale: Features

    @classmethod
    def fit(cls, variances: Sequence[Features]) -> Standardised:
        """Standardise by the mean of several variances, `[e]` each, all of one length (at least one of them).

        The router gives the variances *within* each expert's exemplars. Over all exemplars together, the dimensions
        that tell experts apart would count as the noisiest, and a prompt like none of them would look near.
        """
        variance = np.mean(np.stack(variances), axis=0, dtype=np.float64)
        variance += SHRINKAGE * variance.mean()
        if not variance.any():  # a single exemplar, or equal ones: nothing is known of any dimension
            variance[:] = 1.0
        return cls((1.0 / np.sqrt(variance * len(variance))).astype(np.float32))

    def project(self, features: Features) -> Features:
        return features * self.scale


@dataclass(frozen=True, eq=False)
class LowRank:
    """d(u, v) = ‖L(u − v)‖ (AFS Eq. 18).

    Attributes:
        origin: `[e]`, subtracted first: float32 would round away small differences of large hidden states.
        matrix: `[r, e]`, L.
    """

    origin: Features
    matrix: Features

    @classmethod
    def discriminant(cls, profiles: Sequence[Profile], rank: int) -> LowRank:
        """The first `rank` directions of Fisher's discriminant over the profiles, the background being one of them.

        Two exemplars of one expert are about 1 apart.

        In units of the spread within profiles the scatter *between* their means is largest along these directions.
        The paper's loss finds them too, but then goes on to what only the exemplars share (`bench/routing.py`).
        """
        means, scale, origin = _standardised(profiles)
        scatter = np.zeros((len(scale), len(scale)))
        for profile in profiles:
            deviations = profile.deviations.astype(np.float32) * scale
            scatter += (deviations.T @ deviations) / max(1, len(deviations)) / len(profiles)
        size = float(np.trace(scatter)) / len(scale) or 1.0
        scatter = (1 - SCATTER_SHRINKAGE) * scatter + SCATTER_SHRINKAGE * size * np.eye(len(scale))
        values, vectors = np.linalg.eigh(scatter)
        whiten = (vectors / np.sqrt(values)) @ vectors.T
        directions = np.linalg.svd(means @ whiten, full_matrices=False)[2]
        # The means are centred: the last direction of as many means as there are profiles is rounding.
        kept = directions[: max(1, min(rank, len(profiles) - 1))] @ whiten
        return cls(origin, (kept * scale / np.sqrt(2 * len(kept))).astype(np.float32))

    @classmethod
    def principal(cls, profiles: Sequence[Profile], rank: int) -> LowRank:
        """The first `rank` principal components of all profiles' exemplars: where Auto-FlexSwitch's training starts."""
        _, scale, origin = _standardised(profiles)
        points = np.concatenate([profile.points for profile in profiles])
        centred = (points - points.mean(axis=0)) * scale
        _, values, directions = np.linalg.svd(centred, full_matrices=False)
        kept = directions[:rank]
        size = np.sqrt(2 * float((values[:rank] ** 2).sum()) / len(points)) or 1.0
        return cls(origin, (kept * scale / size).astype(np.float32))

    def project(self, features: Features) -> Features:
        projected: Features = ((features - self.origin) @ self.matrix.T).astype(np.float32)
        return projected


def _standardised(profiles: Sequence[Profile]) -> tuple[Features, Features, Features]:
    """Means of the profiles `[k, e]`, centred and in units of the spread within; that scale `[e]`; the origin `[e]`."""
    means = np.stack([profile.mean for profile in profiles])
    origin: Features = means.mean(axis=0)
    known = [profile.variance for profile in profiles if profile.is_calibrated]
    scale: Features = Standardised.fit(known or [profiles[0].variance]).scale * np.float32(np.sqrt(means.shape[1]))
    centred: Features = ((means - origin) * scale).astype(np.float32)
    return centred, scale, origin
