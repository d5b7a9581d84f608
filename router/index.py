"""The nearest centres of all experts: one immutable snapshot, built anew when experts come or go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import numpy.typing as npt

from router.discriminant import Candidates, Discriminant
from router.features import Features, features_key
from router.metric import Metric
from router.nearest import nearest_of
from router.profile import Profile

LEAST_REACH = 0.01
"""Distances below are rounding: features of one text differ in the last bits with the batch they are computed in."""

BACKGROUND = ""
"""Name and digest of what is no expert's."""

CANDIDATES = 12
"""Experts that are compared again among themselves, where the metric can."""
RETRIEVED = 128
"""Nearest centres among which the candidates are looked for."""


@dataclass(frozen=True)
class Entry:
    """An expert the router knows.

    Attributes:
        key: identifies its exemplars.
        examples: for each centre of the profile, the exemplar nearest to it.
        origins: `[n]`, of which exemplar each of the features is a form that the profile was fitted to.
    """

    name: str
    digest: str
    key: str
    profile: Profile
    examples: tuple[str, ...]
    origins: npt.NDArray[np.int16] | None = field(default=None, compare=False, repr=False)

    @property
    def features_key(self) -> str | None:
        """Under which its features are cached."""
        return None if self.origins is None else features_key(self.key, len(self.origins))


@dataclass(frozen=True)
class Neighbour:
    """A centre near a prompt.

    Attributes:
        name, digest: the expert whose centre it is; BACKGROUND both if it is nobody's.
        distance: from the prompt, in the snapshot's metric.
        reach: the expert's threshold: farther prompts are outside its domain. Infinite for the background.
        centres: how many centres the expert has.
        exemplar: the exemplar nearest to the centre.
    """

    name: str
    digest: str
    distance: float
    reach: float
    centres: int
    exemplar: str

    @property
    def is_within_reach(self) -> bool:
        return self.distance <= self.reach

    @property
    def is_background(self) -> bool:
        return self.digest == BACKGROUND


class Snapshot:
    """Centres, metric and thresholds of a set of experts. Never changes, and may be searched from several threads.

    But for its metric it depends on the set of experts only, not on the order or history in which they were added.

    Args:
        entries: one per name, with features of one width. Of several names for one digest and the same exemplars the
            first in the alphabet stands for all: an alias must not vote twice.
        metric: under which distances are taken.
        background: centres that are no expert's, if any compete.
        quantile: share of an expert's own prompts that its reach is to include.
        margin: factor on every reach.
        previous: what it has measured under the same metric is not measured again.
        device: the engine's, which may search as well.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        metric: Metric | None,
        background: Entry | None,
        *,
        quantile: float,
        margin: float,
        previous: Snapshot | None = None,
        device: str = "cpu",
    ) -> None:
        self._entries = distinct(entries)
        self._names = names_of(entries)
        self.metric = metric
        self.background = background
        self._measured: dict[Profile, _Measured] = {}
        if not self._entries or metric is None:
            return
        self._metric = metric
        self._owners = self._entries if background is None else (*self._entries, background)
        known = previous._measured if previous is not None and previous.metric is metric else {}
        for owner in self._owners:
            self._measured[owner.profile] = known.get(owner.profile) or _measure(owner.profile, metric, quantile)
        own = [self._measured[entry.profile] for entry in self._owners]
        self._reach = _reaches([measured.reach for measured in own[: len(self._entries)]], margin)
        self._reach += [float("inf")] * (len(self._owners) - len(self._entries))
        sizes = [len(measured.points) for measured in own]
        self._owner = np.repeat(np.arange(len(sizes)), sizes)
        self._first = np.cumsum([0, *sizes])
        self._points = np.ascontiguousarray(np.concatenate([measured.points for measured in own]))
        self._nearest_points = nearest_of(self._points, device)
        self._candidates: Candidates | None = None
        if isinstance(metric, Discriminant):
            whitened = [measured.whitened for measured in own if measured.whitened is not None]
            means = np.stack([rows[0] for rows in whitened])
            self._candidates = Candidates(metric, means, np.concatenate([rows[1:] for rows in whitened]))

    def __len__(self) -> int:
        """How many experts can be found."""
        return len(self._entries)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The experts that can be found, by name, each once."""
        return self._entries

    def name_of(self, entry: Entry, visible: Callable[[str], bool] | None = None) -> str | None:
        """What an expert is called where only some names may be found; None where none of its names may."""
        names = self._names.get((entry.digest, entry.key), ())
        return next((name for name in names if visible is None or visible(name)), None)

    def search(
        self,
        features: Features,
        count: int,
        *,
        visible: Callable[[str], bool] | None = None,
        part_of: tuple[int, int] | None = None,
    ) -> tuple[Neighbour, ...]:
        """The `count` nearest centres, or all if there are fewer, nearest first.

        Args:
            features: `[e]`, of one prompt.
            visible: which names may be found; the background always is. Without any of them nothing is found.
            part_of: of which of the `entries` the prompt is an exemplar, and part of which of its centres: it is
                searched as if it were not, see `Profile.reach`.
        """
        if not self._entries:
            return ()
        shown = None if visible is None else self._shown(visible)
        if shown is not None and not shown[: len(self._entries)].any():
            return ()
        if self._candidates is not None and isinstance(self._metric, Discriminant):
            whitened = self._metric.whitened(features[None])
            rows = self._rows_of(self._nearest_experts(self._metric.along(whitened), shown))
            distances = self._candidates.distances(whitened[0], self._owner_of(rows), rows)
        else:
            # One more: the centre that the prompt is part of may fall behind.
            rows, distances = self._nearest(self._metric.project(features[None]), count + bool(part_of), shown)
        if part_of is not None:
            rows, distances = self._left_out(rows, distances, *part_of)
        nearest = np.argsort(distances, kind="stable")[:count]
        return tuple(self._neighbour(int(rows[i]), float(distances[i]), visible) for i in nearest)

    def _left_out(
        self, rows: npt.NDArray[np.int64], distances: Features, owner: int, centre: int
    ) -> tuple[npt.NDArray[np.int64], Features]:
        """The same without a prompt in one of the centres: without it a mean of n is n / (n - 1) times as far from it,
        under any linear metric; a centre of it alone would not be there."""
        row, size = self._first[owner] + centre, int(self._entries[owner].profile.sizes[centre])
        own = rows == row
        if size == 1:
            return rows[~own], distances[~own]
        return rows, np.where(own, distances * np.float32(size / (size - 1)), distances)

    def _shown(self, visible: Callable[[str], bool]) -> npt.NDArray[np.bool_]:
        """Which owners may be found; the background always is."""
        shown = [any(map(visible, self._names[entry.digest, entry.key])) for entry in self._entries]
        return np.array([*shown, True])[: len(self._owners)]

    def _nearest(
        self, query: Features, count: int, shown: npt.NDArray[np.bool_] | None
    ) -> tuple[npt.NDArray[np.int64], Features]:
        """Rows and distances of the nearest centres to a projected prompt `[1, r]`, nearest first."""
        if shown is not None:
            rows = np.flatnonzero(shown[self._owner])
            distances = np.linalg.norm(self._points[rows] - query, axis=1)
            nearest = np.argsort(distances, kind="stable")[:count]
            return rows[nearest], distances[nearest]
        return self._nearest_points.search(query[0], count)

    def _nearest_experts(self, query: Features, shown: npt.NDArray[np.bool_] | None) -> npt.NDArray[np.int64]:
        """At most CANDIDATES experts, in the order of the entries."""
        every = np.arange(len(self._entries)) if shown is None else np.flatnonzero(shown[: len(self._entries)])
        if len(every) <= CANDIDATES:
            return every
        rows, _ = self._nearest(query, RETRIEVED, shown)
        owners = [owner for owner in dict.fromkeys(self._owner[rows].tolist()) if owner < len(self._entries)]
        return np.sort(np.array(owners[:CANDIDATES], dtype=np.int64))

    def _rows_of(self, experts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """All centres of those experts and of the background."""
        owners = [*experts, *range(len(self._entries), len(self._owners))]
        return np.concatenate([np.arange(self._first[owner], self._first[owner + 1]) for owner in owners])

    def _owner_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The experts among the owners of those centres."""
        owners = np.unique(self._owner[rows])
        return owners[owners < len(self._entries)]

    def _neighbour(self, row: int, distance: float, visible: Callable[[str], bool] | None) -> Neighbour:
        owner = int(self._owner[row])
        entry, first = self._owners[owner], self._first[owner]
        return Neighbour(
            # An expert is called by a name that may be found: others' names are not told.
            self.name_of(entry, visible) or entry.name,
            entry.digest,
            distance,
            self._reach[owner],
            int(self._first[owner + 1] - first),
            entry.examples[row - first],
        )


def distinct(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """The entries by name, without aliases."""
    found = {(entry.digest, entry.key): entry for entry in sorted(entries, key=lambda e: e.name, reverse=True)}
    return tuple(sorted(found.values(), key=lambda entry: entry.name))


def names_of(entries: Sequence[Entry]) -> dict[tuple[str, str], tuple[str, ...]]:
    """All names of what `distinct` keeps one entry of, by digest and key, in alphabetical order."""
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    for entry in sorted(entries, key=lambda entry: entry.name):
        found[entry.digest, entry.key] = (*found.get((entry.digest, entry.key), ()), entry.name)
    return found


@dataclass(frozen=True, eq=False)
class _Measured:
    """A profile under a metric: its centres `[E, r]`; how far it reaches, if that is known; and, under a discriminant,
    its mean and its centres whitened, `[1 + E, e]`."""

    points: Features
    reach: float | None
    whitened: Features | None = None


def _measure(profile: Profile, metric: Metric, quantile: float) -> _Measured:
    reach = profile.reach(metric, quantile) if profile.is_calibrated else None
    if not isinstance(metric, Discriminant):
        return _Measured(metric.project(profile.centres), reach)
    whitened = metric.whitened(np.vstack([profile.mean, profile.centres]))
    return _Measured(metric.along(whitened[1:]), reach, whitened)


def _reaches(own: Sequence[float | None], margin: float) -> list[float]:
    """Each expert's threshold. One exemplar alone says nothing of its surroundings: such an expert gets the median of
    the others', and without others only what equals its exemplar."""
    known = [reach for reach in own if reach is not None]
    borrowed = median(known) if known else 0.0
    return [max(LEAST_REACH, margin * (borrowed if reach is None else reach)) for reach in own]
