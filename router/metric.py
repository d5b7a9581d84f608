"""Where distances between features mean something."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from router.features import Features

SHRINKAGE = 0.1
"""Share of the mean variance added to each dimension's: among a few exemplars of one template a dimension may hardly
vary, and dividing by next to nothing would let it decide alone."""


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
