"""The learned metric of the server: Fisher's discriminant, over the whole library and anew among few candidates.

In units of the spread within experts, experts lie apart along the directions of their means. A handful of directions
finds the experts that a prompt may be for. What tells these apart from each other is another matter: between
"in French words" and "in Spanish words" lies one direction, which is lost among the hundreds that a thousand experts
need. So the nearest experts are compared again along the directions of their own means and the background's alone: a
large library decides as well as a small one of those experts would. The paper's loss finds the directions too, but then
goes on to what only the exemplars share (`bench/routing.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from router.clusters import clusters
from router.features import Features
from router.metric import standard
from router.profile import Profile

SHRINKAGE = 0.5
"""Share of the identity in the scatter within experts: it has e² entries, and a library shows a few hundred texts."""


@dataclass(frozen=True, eq=False)
class Discriminant:
    """Two exemplars of one expert are about 1 apart, here and among candidates.

    Attributes:
        origin: `[e]`, subtracted first: float32 would round away small differences of large hidden states.
        whiten: `[e, e]`, from features to units of the spread within experts, in all directions alike.
        background: `[b, e]` orthonormal rows: the whitened directions of the background's parts.
        directions: `[r, e]` orthonormal rows: those along which the whole library lies apart most.
    """

    origin: Features
    whiten: Features
    background: Features
    directions: Features

    @classmethod
    def fit(cls, profiles: Sequence[Profile], rank: int, *, parts: int = 1) -> Discriminant:
        """Fit to profiles, at least one, of which the last is the background's.

        Args:
            rank: most directions of the whole library (r).
            parts: into how many clusters the background is split. Its texts have little in common: told apart from
                each other, each kind of them is told apart better from the experts too.
        """
        scale, origin = standard(profiles)
        width = len(scale)
        means, scatter = [], np.zeros((width, width))
        for i, profile in enumerate(profiles):
            groups = _split(profile, scale, parts if i == len(profiles) - 1 else 1)
            for group in groups:
                mean = group.mean(axis=0)
                means.append((mean + (profile.mean - origin) * scale) / np.sqrt(len(groups)))
                scatter += (group - mean).T @ (group - mean) / sum(map(len, groups)) / len(profiles)
        size = float(np.trace(scatter)) / width or 1.0
        scatter = (1 - SHRINKAGE) * scatter + SHRINKAGE * size * np.eye(width)
        # Any square root of the inverse gives the same distances; this one takes a fraction of an eigenvalue problem.
        whiten = np.linalg.inv(np.linalg.cholesky(scatter)).T
        whitened = np.stack(means) @ whiten
        directions = np.linalg.svd(whitened, full_matrices=False)[2]
        return cls(
            origin=origin.astype(np.float32),
            # In the order in which it comes back from disk: another gives other last bits.
            whiten=np.ascontiguousarray(scale[:, None] * whiten, dtype=np.float32),
            background=_orthonormal(whitened[len(profiles) - 1 :]),
            # The means are centred: the last direction of as many as there are is rounding.
            directions=np.ascontiguousarray(directions[: max(1, min(rank, len(means) - 1))], dtype=np.float32),
        )

    def project(self, features: Features) -> Features:
        """`[n, e]` → `[n, r]` float32: along the directions of the whole library."""
        found: Features = ((features - self.origin) @ self._projection).astype(np.float32)
        return found

    def whitened(self, features: Features) -> Features:
        """`[n, e]` → `[n, e]` float32."""
        found: Features = ((features - self.origin) @ self.whiten).astype(np.float32)
        return found

    def along(self, whitened: Features) -> Features:
        """What `project` gives, of features that are whitened already."""
        found: Features = whitened @ self.directions.T / np.float32(np.sqrt(2 * len(self.directions)))
        return found

    @cached_property
    def _projection(self) -> Features:
        projection: Features = self.along(self.whiten)
        return projection


class Candidates:
    """Distances among few experts and the background, along the directions of their own means.

    Args:
        means: `[k, e]`, whitened, of each expert's exemplars.
        centres: `[m, e]`, whitened, of all experts and the background.
    """

    def __init__(self, metric: Discriminant, means: Features, centres: Features) -> None:
        self._metric = metric
        self._means = means
        self._centres = centres

    def distances(
        self, query: Features, experts: Sequence[int] | npt.NDArray[np.int64], rows: npt.NDArray[np.int64]
    ) -> Features:
        """`[len(rows)]`: from a whitened query `[e]` to those centres, as the given experts' directions show them."""
        shared = self._metric.background
        means = self._means[experts]
        own = _orthonormal(means - (means @ shared.T) @ shared)
        apart = self._centres[rows] - query
        squares = (self._background_parts[rows] - query @ shared.T) ** 2
        found: Features = np.sqrt(squares.sum(axis=1) + ((apart @ own.T) ** 2).sum(axis=1))
        return found / np.float32(np.sqrt(2 * (len(shared) + len(own))))

    @cached_property
    def _background_parts(self) -> Features:
        parts: Features = self._centres @ self._metric.background.T
        return parts


def _split(profile: Profile, scale: Features, count: int) -> list[Features]:
    """The profile's deviations in units of `scale`, in at most `count` clusters."""
    deviations: Features = profile.spread * scale
    if count == 1 or len(deviations) <= count:
        return [deviations]
    members = clusters(deviations, count, seed=0)
    return [deviations[members == cluster] for cluster in range(members.max() + 1)]


def _orthonormal(rows: npt.NDArray[np.floating[Any]]) -> Features:
    """Orthonormal rows that span the same directions; those that depend on others are left out."""
    lengths = np.linalg.norm(rows, axis=1)
    q, r = np.linalg.qr(rows.T)
    kept = np.abs(np.diag(r)) > 1e-4 * max(1.0, float(lengths.max(initial=0.0)))
    found: Features = np.ascontiguousarray(q.T[kept], dtype=np.float32)
    return found
