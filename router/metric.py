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
    def principal(cls, profiles: Sequence[Profile], rank: int) -> LowRank:
        """The first `rank` principal components of all profiles' exemplars: where Auto-FlexSwitch's training starts."""
        scale, origin = standard(profiles)
        points = np.concatenate([profile.points for profile in profiles])
        centred = (points - points.mean(axis=0)) * scale
        _, values, directions = np.linalg.svd(centred, full_matrices=False)
        kept = directions[:rank]
        size = np.sqrt(2 * float((values[:rank] ** 2).sum()) / len(points)) or 1.0
        return cls(origin, (kept * scale / size).astype(np.float32))

    def project(self, features: Features) -> Features:
        projected: Features = ((features - self.origin) @ self.matrix.T).astype(np.float32)
        return projected


def standard(profiles: Sequence[Profile]) -> tuple[Features, Features]:
    """What makes the mean spread within profiles 1 in each dimension, `[e]`, and the mean of their means, `[e]`."""
    means = np.stack([profile.mean for profile in profiles])
    known = [profile.variance for profile in profiles if profile.is_calibrated]
    scale: Features = Standardised.fit(known or [profiles[0].variance]).scale * np.float32(np.sqrt(means.shape[1]))
    return scale, means.mean(axis=0)
