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
from router.map import Points, background_places, chosen, names_in, project
from router.options import RouteOptions

EXEMPLARS = 24
"""Most exemplars of an expert that are routed, evenly spread."""

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
    named = names_in(snapshot, options)
    traffic = Counter(one.digest for one in seen)
    shown = chosen(named, snapshot.entries, traffic, most)
    column = {snapshot.entries[owner].digest: i for i, owner in reversed(list(enumerate(shown)))}

    def routed(owner: int, row: int, found: tuple[Neighbour, ...]) -> int:
        mix = decide(found, rules, options).parts
        if not mix:
            return len(shown) + 1
        return row if mix[0][1] == snapshot.entries[owner].digest else column.get(mix[0][1], len(shown))

    projection = project(snapshot, shown)
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
        places = projection.place(entry.profile.centres)
        rows.append(Row(named[owner], entry.digest, places, told, traffic[entry.digest], is_held))
    prompts = np.stack([one.features for one in seen]) if seen else None
    names = {row.digest: row.name for row in reversed(rows)}
    return Report(
        tuple(rows),
        len(named) - len(shown),
        background_places(snapshot, projection),
        np.empty((0, 2)) if prompts is None else projection.place(prompts),
        tuple(None if one.digest is None else names.get(one.digest) for one in seen),
        projection.spread,
    )


def _evenly(rows: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
    """At most EXEMPLARS of the rows."""
    chosen: npt.NDArray[Scalar] = rows[np.unique(np.linspace(0, len(rows) - 1, EXEMPLARS).round().astype(int))]
    return chosen
