"""The face of the router: experts come and go, prompts get a mix."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from router.decision import EMPTY_PROMPT, NO_EXPERTS, Decision, decide
from router.features import FeatureCache, Features, Featurizer, checked, featurize_all
from router.index import Entry, Snapshot
from router.mix import MixMode
from router.profile import LOWEST_QUANTILE, fit_profile
from store.errors import SwitchyardError


@dataclass(frozen=True)
class RouterSettings:
    """How prompts are matched with experts.

    Raises:
        ValueError: a value is out of range.
    """

    mode: MixMode = MixMode.TOP1
    """One expert, or a weighted mix. No measurement on language models is published for soft mixes."""
    centres: int = 20
    """Most K-Means centres per expert (E; AFS recommends 20 to 40)."""
    neighbours: int = 10
    """Nearest centres that a prompt is compared with (C; AFS recommends 10)."""
    min_share: float = 0.2
    """Soft mixes leave out experts with a smaller share of the votes."""
    steps: int = 5
    """Weights of soft mixes are multiples of 1/steps."""
    quantile: float = 0.98
    """Share of an expert's own held-out exemplars that lie within its reach."""
    margin: float = 1.0
    """Factor on every reach; larger accepts more prompts of either kind (`bench/routing_layers.py`)."""
    folds: int = 4
    """Folds in which exemplars are held out to measure the reach."""
    max_exemplars: int = 512
    """Exemplars beyond, evenly spread over the list, are left out."""
    feature_batch: int = 16
    """Exemplars per call of the featurizer."""
    seed: int = 0
    """Of K-Means and of the folds."""

    def __post_init__(self) -> None:
        for name in ("centres", "neighbours", "steps", "max_exemplars", "feature_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.folds < 2:
            raise ValueError(f"folds must be at least 2, not {self.folds}")
        if not LOWEST_QUANTILE <= self.quantile <= 1:
            raise ValueError(f"quantile must be between {LOWEST_QUANTILE} and 1, not {self.quantile}")
        if not 0 <= self.min_share <= 1:
            raise ValueError(f"min_share must be between 0 and 1, not {self.min_share}")
        if not 0 < self.margin < float("inf"):
            raise ValueError(f"margin must be a positive number, not {self.margin}")


class Router:
    """Routes prompts by the nearest exemplar centres. For the tasks of one event loop.

    What `add_expert` and `remove_expert` have changed is seen by every call of `route` that decides later; until then
    the previous state decides. A decision comes from one immutable snapshot, which the first call of `route` after a
    change builds: so that a thousand experts added at start cost one build, not a thousand.

    Args:
        featurize: the engine's features of the pristine base.
        cache: where features of exemplars are kept between runs; it must belong to the same base and layer.
    """

    def __init__(self, featurize: Featurizer, cache: FeatureCache, settings: RouterSettings) -> None:
        self._featurize = featurize
        self._cache = cache
        self._settings = settings
        self._experts: dict[str, Entry] = {}
        self._changes: dict[str, object] = {}
        """Names whose addition is under way, each with the token of the latest call."""
        self._edition = 0
        """Counts the changes of `_experts`."""
        self._snapshot, self._snapshot_edition = self._build(()), 0
        self._building = asyncio.Lock()
        self._featurizing = asyncio.Lock()

    @property
    def experts(self) -> tuple[str, ...]:
        """Names that prompts can be routed to, in alphabetical order."""
        return tuple(sorted(self._experts))

    async def add_expert(self, name: str, digest: str, exemplars: Sequence[str], exemplars_key: str) -> None:
        """Let prompts find an expert by its exemplars; an expert of that name is replaced when this one is ready.

        Without exemplars that are not blank it can be reached by its name only. A call that a later `add_expert` or
        `remove_expert` of the same name overtakes changes nothing.

        Args:
            digest: of the expert file; several names may share it.
            exemplars: example prompts.
            exemplars_key: identifies them, e.g. their digest; features cached under it are used again.

        Raises:
            SwitchyardError: the featurizer failed; whatever was known of the name stays.
        """
        change = self._changes[name] = object()
        try:
            texts = _evenly([text for text in dict.fromkeys(exemplars) if text.strip()], self._settings.max_exemplars)
            entry = await self._entry(name, digest, texts, exemplars_key) if texts else None
            if self._changes.get(name) is not change:
                return
            if entry is None:
                self._forget(name)
                return
            self._check_width(entry)
            self._experts[name] = entry
            self._edition += 1
        finally:
            if self._changes.get(name) is change:
                del self._changes[name]

    def remove_expert(self, name: str) -> None:
        """Route nothing to that name any more; an addition of it under way is called off."""
        self._changes.pop(name, None)
        self._forget(name)

    async def route(self, prompt: str) -> Decision:
        """Which experts should answer a prompt, and why.

        Raises:
            SwitchyardError: the featurizer failed.
        """
        if not prompt.strip():
            return EMPTY_PROMPT
        if not self._experts:  # base-only traffic pays nothing
            return NO_EXPERTS
        features = checked(await self._featurize([prompt]), 1)[0]
        snapshot = await self._current()
        given = self._settings
        neighbours = await asyncio.to_thread(snapshot.search, features, given.neighbours)
        return decide(neighbours, mode=given.mode, min_share=given.min_share, steps=given.steps)

    def _forget(self, name: str) -> None:
        if self._experts.pop(name, None) is not None:
            self._edition += 1

    def _check_width(self, entry: Entry) -> None:
        width = entry.profile.centres.shape[1]
        for other in self._experts.values():
            if other.name != entry.name and other.profile.centres.shape[1] != width:
                raise SwitchyardError(
                    f"the routing features of {entry.name!r} have {width} dimensions, those of {other.name!r} "
                    f"{other.profile.centres.shape[1]}"
                )

    async def _entry(self, name: str, digest: str, texts: list[str], key: str) -> Entry:
        features = await self._exemplar_features(texts, key)
        given = self._settings
        profile = await asyncio.to_thread(
            fit_profile, features, centres=given.centres, folds=given.folds, seed=given.seed
        )
        return Entry(name, digest, key, profile)

    async def _exemplar_features(self, texts: list[str], key: str) -> Features:
        key = f"{key}/{len(texts)}"  # `max_exemplars` may have changed
        features = await asyncio.to_thread(self._cache.load, key, len(texts))
        if features is None:
            async with self._featurizing:  # one expert at a time, or a start with many would flood the engine
                features = await featurize_all(self._featurize, texts, self._settings.feature_batch)
            await asyncio.to_thread(self._cache.save, key, features)
        return features

    async def _current(self) -> Snapshot:
        """The snapshot of the experts as they are when this returns."""
        async with self._building:
            while self._snapshot_edition != self._edition:
                edition, entries = self._edition, tuple(self._experts.values())
                self._snapshot = await asyncio.to_thread(self._build, entries)
                self._snapshot_edition = edition
            return self._snapshot

    def _build(self, entries: Sequence[Entry]) -> Snapshot:
        return Snapshot(entries, quantile=self._settings.quantile, margin=self._settings.margin)


def _evenly(texts: list[str], most: int) -> list[str]:
    """At most `most` of the texts, evenly spread: exemplars are often sorted by kind."""
    if len(texts) <= most:
        return texts
    return [texts[i] for i in np.linspace(0, len(texts) - 1, most).round().astype(int)]
