"""A map of experts: their centres in the two directions in which they lie apart most, and where prompts lie."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from router.features import Features
from router.index import Entry, Snapshot
from router.metric import Metric
from router.options import RouteOptions

Points = npt.NDArray[np.float64]
"""`[n, 2]`: places on the map."""


@dataclass(frozen=True, eq=False)
class Projection:
    """From features to the plane.

    Attributes:
        origin: `[r]`, in the metric's space.
        axes: `[2, r]`.
        spread: the share of the centres' spread that each axis shows.
    """

    metric: Metric | None
    origin: Points
    axes: Points
    spread: tuple[float, float]

    def place(self, features: Features) -> Points:
        """`[n, e]` → `[n, 2]`."""
        if self.metric is None:
            return np.zeros((len(features), 2))
        placed: Points = (self.metric.project(features).astype(np.float64) - self.origin) @ self.axes.T
        return placed

    @property
    def edition(self) -> str:
        """Maps of one edition can be laid upon each other."""
        return hashlib.sha256(self.origin.tobytes() + self.axes.tobytes()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class Place:
    """An expert on the map."""

    name: str
    digest: str
    centres: Points


@dataclass(frozen=True, eq=False)
class Map:
    """Attributes:
    places: the experts shown, by name.
    left_out: how many others there are.
    background: centres of general text.
    """

    places: tuple[Place, ...]
    left_out: int
    background: Points
    projection: Projection


def draw_map(snapshot: Snapshot, traffic: Counter[str | None], options: RouteOptions, most: int) -> Map:
    """Lay out what may be seen. Takes milliseconds.

    Args:
        traffic: digest → prompts that it answered lately.
        options: what the caller may find; nothing is told of other experts.
        most: experts shown: first those that were asked most, then an even choice by name.
    """
    named = names_in(snapshot, options)
    shown = chosen(named, snapshot.entries, traffic, most)
    projection = project(snapshot, shown)
    entries = [(named[owner], snapshot.entries[owner]) for owner in shown]
    return Map(
        tuple(Place(name, entry.digest, projection.place(entry.profile.centres)) for name, entry in entries),
        len(named) - len(shown),
        background_places(snapshot, projection),
        projection,
    )


def names_in(snapshot: Snapshot, options: RouteOptions) -> dict[int, str]:
    """Of the snapshot's entries that may be seen: place among them → name."""
    visible = None if options.sees_all else options.sees
    return {i: name for i, entry in enumerate(snapshot.entries) if (name := snapshot.name_of(entry, visible))}


def chosen(named: dict[int, str], entries: Sequence[Entry], traffic: Counter[str | None], most: int) -> list[int]:
    """Which of the entries are shown, by name."""
    busy = sorted((owner for owner in named if traffic[entries[owner].digest]), key=lambda owner: named[owner])
    busy = sorted(busy, key=lambda owner: -traffic[entries[owner].digest])[:most]
    idle = sorted(named.keys() - set(busy), key=lambda owner: named[owner])
    if busy or len(idle) > most:
        spaced = np.unique(np.linspace(0, len(idle) - 1, max(0, min(most - len(busy), len(idle)))).round().astype(int))
        idle = [idle[i] for i in spaced]
    return sorted([*busy, *idle], key=lambda owner: named[owner])


def project(snapshot: Snapshot, shown: Sequence[int]) -> Projection:
    """Along the two directions in which the centres of these and of the background lie apart most, the many of one
    weighing as much as the few of another."""
    entries = [snapshot.entries[owner] for owner in shown]
    if snapshot.background is not None:
        entries.append(snapshot.background)
    if snapshot.metric is None or not entries:
        return Projection(None, np.zeros(0), np.zeros((2, 0)), (0.0, 0.0))
    points = [snapshot.metric.project(entry.profile.centres).astype(np.float64) for entry in entries]
    origin = np.mean([own.mean(axis=0) for own in points], axis=0)
    weighed = np.concatenate([(own - origin) / np.sqrt(len(own)) for own in points])
    _, sizes, directions = np.linalg.svd(weighed, full_matrices=False)
    axes = np.zeros((2, weighed.shape[1]))
    axes[: len(directions[:2])] = directions[:2]
    # Each direction is as good as its opposite; without a rule, the map would flip with the last bits.
    strongest = axes[np.arange(2), np.abs(axes).argmax(axis=1)]
    axes *= np.where(strongest < 0, -1.0, 1.0)[:, None]
    shares = np.zeros(2)
    shares[: len(sizes[:2])] = sizes[:2] ** 2 / max(float((sizes**2).sum()), 1e-12)
    return Projection(snapshot.metric, origin, axes, (float(shares[0]), float(shares[1])))


def background_places(snapshot: Snapshot, projection: Projection) -> Points:
    """Where centres of general text lie."""
    if snapshot.background is None:
        return np.empty((0, 2))
    return projection.place(snapshot.background.profile.centres)
