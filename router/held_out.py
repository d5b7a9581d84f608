"""Experts without a fifth of their exemplars: where that fifth would go tells how new prompts fare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from router.features import FeatureCache, Features
from router.index import Entry, Snapshot
from router.metric import Metric
from router.profile import fit_profile

PART = 5
"""Every fifth exemplar is held out, with all its forms."""

Key = tuple[str, str]
"""Digest of an expert, and key of its exemplars."""


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Exemplars, and a snapshot that has never seen them.

    Attributes:
        snapshot: the experts as they would be without them.
        features: `[h, e]` of them by expert; those with too few exemplars, or without features at hand, are left out.
    """

    snapshot: Snapshot
    features: Mapping[Key, Features]


def hold_out(
    shown: Sequence[Entry],
    every: Sequence[Entry],
    *,
    cache: FeatureCache,
    fit: Callable[[Sequence[Entry]], Metric | None],
    build: Callable[[Sequence[Entry], Metric | None], Snapshot],
    centres: int,
    seed: int,
) -> HeldOut:
    """Fit some experts without a fifth of their exemplars, and all of them anew among each other. May take seconds.

    Args:
        shown: those that exemplars are held out of.
        every: all experts, by all their names.
        cache: where their features are; an expert whose are gone is left as it is.
        centres, seed: as the experts were fitted.
    """
    thinned: dict[Key, Entry] = {}
    features: dict[Key, Features] = {}
    for entry in shown:
        origins = entry.origins
        key = entry.features_key
        rows = None if key is None or origins is None else cache.load(key, len(origins))
        if rows is None or origins is None:
            continue
        held = origins % PART == PART - 1
        if held.any():
            profile = fit_profile(rows[~held], centres=centres, seed=seed)
            thinned[entry.digest, entry.key] = replace(entry, profile=profile, examples=("",) * len(profile.centres))
            features[entry.digest, entry.key] = rows[held]
    if not thinned:
        return HeldOut(Snapshot((), None, None, quantile=1.0, margin=1.0), features)
    entries = [
        entry if (less := thinned.get((entry.digest, entry.key))) is None else replace(less, name=entry.name)
        for entry in every
    ]
    return HeldOut(build(entries, fit(entries)), features)
