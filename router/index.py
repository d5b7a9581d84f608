"""The nearest centres of all experts: one immutable snapshot, built anew when experts come or go."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

import faiss
import numpy as np

from router.features import Features
from router.metric import Metric, Standardised
from router.profile import Profile

LEAST_REACH = 0.01
"""Distances below are rounding: features of one text differ in the last bits with the batch they are computed in."""

_GPU_SCRATCH_BYTES = 64 << 20


@dataclass(frozen=True)
class Entry:
    """An expert the router knows.

    Attributes:
        key: identifies its exemplars.
    """

    name: str
    digest: str
    key: str
    profile: Profile


@dataclass(frozen=True)
class Neighbour:
    """A centre near a prompt.

    Attributes:
        name, digest: the expert whose centre it is.
        distance: from the prompt, in the snapshot's metric.
        reach: the expert's threshold: farther prompts are outside its domain.
    """

    name: str
    digest: str
    distance: float
    reach: float

    @property
    def is_within_reach(self) -> bool:
        return self.distance <= self.reach


class Snapshot:
    """Centres, metric and thresholds of a set of experts. Never changes, and may be searched from several threads.

    It depends on the set of experts only, not on the order or history in which they were added.

    Args:
        entries: one per name, with features of one width. Of several names for one digest and the same exemplars the
            first in the alphabet stands for all: an alias must not vote twice.
        quantile: share of an expert's own prompts that its reach is to include.
        margin: factor on every reach.
    """

    def __init__(self, entries: Sequence[Entry], *, quantile: float, margin: float) -> None:
        distinct = {(e.digest, e.key): e for e in sorted(entries, key=lambda e: e.name, reverse=True)}
        self._entries = tuple(sorted(distinct.values(), key=lambda e: e.name))
        if not self._entries:
            return
        profiles = [entry.profile for entry in self._entries]
        known = [profile.variance for profile in profiles if profile.is_calibrated]
        self._metric: Metric = Standardised.fit(known or [profiles[0].variance])
        self._reach = _reaches(profiles, self._metric, quantile, margin)
        self._owner = np.repeat(np.arange(len(profiles)), [len(profile.centres) for profile in profiles])
        self._index = _flat_index(self._metric.project(np.concatenate([profile.centres for profile in profiles])))
        # faiss's GPU indexes share their scratch memory among searches.
        self._exclusive = threading.Lock() if faiss.get_num_gpus() else nullcontext()

    def __len__(self) -> int:
        """How many experts can be found."""
        return len(self._entries)

    def search(self, features: Features, count: int) -> tuple[Neighbour, ...]:
        """The `count` nearest centres, or all if there are fewer, nearest first.

        Args:
            features: `[e]`, of one prompt.
        """
        if not self._entries:
            return ()
        query = self._metric.project(features[None])
        with self._exclusive:
            squares, ids = self._index.search(query, min(count, len(self._owner)))
        return tuple(
            Neighbour(self._entries[owner].name, self._entries[owner].digest, float(distance), self._reach[owner])
            for owner, distance in zip(self._owner[ids[0]], np.sqrt(squares[0]), strict=True)
        )


def _reaches(profiles: Sequence[Profile], metric: Metric, quantile: float, margin: float) -> list[float]:
    """Each expert's threshold. One exemplar alone says nothing of its surroundings: such an expert gets the median of
    the others', and without others only what equals its exemplar."""
    own = [profile.reach(metric, quantile) if profile.is_calibrated else None for profile in profiles]
    known = [reach for reach in own if reach is not None]
    borrowed = median(known) if known else 0.0
    return [max(LEAST_REACH, margin * (borrowed if reach is None else reach)) for reach in own]


def _flat_index(points: Features) -> Any:
    """An exact index of `[m, r]` points, on the first GPU if this faiss was built for one."""
    index = faiss.IndexFlatL2(points.shape[1])
    index.add(points)
    if faiss.get_num_gpus() == 0:
        return index
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(_GPU_SCRATCH_BYTES)  # the default of 1.5 GiB belongs to the engine
    return faiss.index_cpu_to_gpu(resources, 0, index)
