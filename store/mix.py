"""The mix: which experts, at which weights, produce an answer."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property

WEIGHT_DECIMALS = 4


@dataclass(frozen=True)
class Mix:
    """Expert digests and their weights, in canonical form (sorted by digest, rounded, no zeros).

    The empty mix is the base model. Weights are absolute multipliers of each expert's task vector, may exceed 1
    or be negative, and are rounded to `WEIGHT_DECIMALS` decimals so that equal intentions share one batch.
    """

    parts: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, weights: dict[str, float]) -> Mix:
        """Build the canonical mix of `{expert digest: weight}`.

        Raises:
            ValueError: a weight is NaN or infinite.
        """
        for digest, weight in weights.items():
            if not math.isfinite(weight):
                raise ValueError(f"the weight of expert {digest} is not finite: {weight}")
        rounded = ((digest, round(weight, WEIGHT_DECIMALS)) for digest, weight in weights.items())
        return cls(tuple(sorted((digest, weight) for digest, weight in rounded if weight != 0.0)))

    @cached_property
    def digest(self) -> str:
        """sha256 of the canonical form: the key of batching and of every cache."""
        text = ";".join(f"{digest}={weight:.{WEIGHT_DECIMALS}f}" for digest, weight in self.parts)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def is_base(self) -> bool:
        return not self.parts


BASE_MIX = Mix()
