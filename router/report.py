"""How well experts are told apart: which of their own exemplars would be routed to others, and a map of them all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from router.decision import Rules, decide
from router.features import Features
from router.held_out import HeldOut
from router.index import Entry, Neighbour, Snapshot
from router.metric import Metric
from router.options import RouteOptions

EXEMPLARS = 24
"""Most exemplars of an expert that are routed, evenly spread."""

Points = npt.NDArray[np.float64]
"""`[n, 2]`: places on the map."""


Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True, eq=False)
class Seen:
    """A prompt that was routed, without its text.

    Attributes:
        features: `[e]`.
        digest: of the first expert that it was routed to; None is the base.
    """

    features: Features
    digest: str | None


@dataclass(frozen=True, eq=False)
class Row:
    """One expert.

    Attributes:
        centres: its centres on the map.
        counts: exemplars of its own that are routed to each of the experts of the report, in its order, to any other,
            and to the base.
        requests: how many of the seen prompts went to it.
        is_held_out: whether the exemplars were held out of all that was fitted, or each of its centre only.
    """

    name: str
    digest: str
    centres: Points
    counts: tuple[int, ...]
    requests: int
    is_held_out: bool


@dataclass(frozen=True, eq=False)
class Report:
    """Experts against each other.

    Attributes:
        rows: the experts shown, by name.
        left_out: how many others there are.
        background: centres of general text on the map.
        seen: places of the prompts seen; `seen_names` tells the expert of each, None for the base and others.
        spread: the share of the centres' spread that the two axes of the map show.
    """

    rows: tuple[Row, ...]
    left_out: int
    background: Points
    seen: Points
    seen_names: tuple[str | None, ...]
    spread: tuple[float, float]


def make_report(
    snapshot: Snapshot,
    seen: Sequence[Seen],
    hold: Callable[[Sequence[Entry]], HeldOut],
    rules: Rules,
    options: RouteOptions,
    *,
    neighbours: int,
    most: int,
) -> Report:
    """Route exemplars of experts as if they had not been shown, and draw a map. Takes seconds.

    Of an expert with enough exemplars a fifth is held out, and all is fitted without. Where that cannot be, an exemplar
    counts as left out of its centre, as in `Profile.reach`; the metric has seen it then, and so have other centres its
    other forms (`router.variants`): what is confused is confused by users too, while what is not may still be.

    Args:
        hold: fits the experts without a fifth of the exemplars of these.
        options: what the caller may find; nothing is told of other experts.
        most: experts shown: first those that were seen most, then an even choice by name.
    """
    visible = None if options.sees_all else options.sees
    named = {i: name for i, entry in enumerate(snapshot.entries) if (name := snapshot.name_of(entry, visible))}
    traffic = Counter(one.digest for one in seen)
    shown = _chosen(named, snapshot.entries, traffic, most)
    column = {snapshot.entries[owner].digest: i for i, owner in reversed(list(enumerate(shown)))}

    def routed(owner: int, row: int, found: tuple[Neighbour, ...]) -> int:
        mix = decide(found, rules, options).parts
        if not mix:
            return len(shown) + 1
        return row if mix[0][1] == snapshot.entries[owner].digest else column.get(mix[0][1], len(shown))

    background = snapshot.background
    drawn = [snapshot.entries[owner] for owner in shown]
    project, spread = _map(snapshot.metric, drawn if background is None else [*drawn, background])
    held = hold([snapshot.entries[owner] for owner in shown])

    def found_by(owner: int, entry: Entry) -> Iterator[tuple[Neighbour, ...]]:
        if (features := held.features.get((entry.digest, entry.key))) is not None:
            for one in _evenly(features):
                yield held.snapshot.search(one, neighbours, visible=visible)
            return
        for one, centre in zip(_evenly(entry.profile.points), _evenly(entry.profile.members), strict=True):
            yield snapshot.search(one, neighbours, visible=visible, part_of=(owner, int(centre)))

    rows = []
    for row, owner in enumerate(shown):
        entry = snapshot.entries[owner]
        counts = Counter(routed(owner, row, found) for found in found_by(owner, entry))
        told, is_held = tuple(counts[i] for i in range(len(shown) + 2)), (entry.digest, entry.key) in held.features
        places = project(entry.profile.centres)
        rows.append(Row(named[owner], entry.digest, places, told, traffic[entry.digest], is_held))
    prompts = np.stack([one.features for one in seen]) if seen else None
    names = {row.digest: row.name for row in reversed(rows)}
    return Report(
        tuple(rows),
        len(named) - len(shown),
        np.empty((0, 2)) if background is None else project(background.profile.centres),
        np.empty((0, 2)) if prompts is None else project(prompts),
        tuple(None if one.digest is None else names.get(one.digest) for one in seen),
        spread,
    )


def _chosen(named: dict[int, str], entries: Sequence[Entry], traffic: Counter[str | None], most: int) -> list[int]:
    """Owners, by name."""
    busy = sorted((owner for owner in named if traffic[entries[owner].digest]), key=lambda owner: named[owner])
    busy = sorted(busy, key=lambda owner: -traffic[entries[owner].digest])[:most]
    idle = sorted(named.keys() - set(busy), key=lambda owner: named[owner])
    if busy or len(idle) > most:
        spaced = np.unique(np.linspace(0, len(idle) - 1, max(0, min(most - len(busy), len(idle)))).round().astype(int))
        idle = [idle[i] for i in spaced]
    return sorted([*busy, *idle], key=lambda owner: named[owner])


def _evenly(rows: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
    """At most EXEMPLARS of the rows."""
    chosen: npt.NDArray[Scalar] = rows[np.unique(np.linspace(0, len(rows) - 1, EXEMPLARS).round().astype(int))]
    return chosen


def _map(metric: Metric | None, entries: Sequence[Entry]) -> tuple[Callable[[Features], Points], tuple[float, float]]:
    """`[n, e]` → `[n, 2]`, along the two directions in which the centres of these lie apart most, the many of one
    weighing as much as the few of another; and what share of their spread each of the two shows."""
    if metric is None or not entries:
        return lambda features: np.zeros((len(features), 2)), (0.0, 0.0)
    points = [metric.project(entry.profile.centres).astype(np.float64) for entry in entries]
    origin = np.mean([own.mean(axis=0) for own in points], axis=0)
    weighed = np.concatenate([(own - origin) / np.sqrt(len(own)) for own in points])
    _, sizes, directions = np.linalg.svd(weighed, full_matrices=False)
    axes = np.zeros((2, weighed.shape[1]))
    axes[: len(directions[:2])] = directions[:2]
    shares = np.zeros(2)
    shares[: len(sizes[:2])] = sizes[:2] ** 2 / max(float((sizes**2).sum()), 1e-12)

    def project(features: Features) -> Points:
        placed: Points = (metric.project(features).astype(np.float64) - origin) @ axes.T
        return placed

    return project, (float(shares[0]), float(shares[1]))
