"""From an expert's exemplars to what the router knows of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from router.background import background_key, background_texts
from router.features import FeatureCache, Features, Featurizer, features_key, featurize_all
from router.index import BACKGROUND, Entry
from router.profile import fit_profile
from router.settings import RouterSettings
from router.variants import variants


class Entries:
    """Makes entries: of one expert at a time, or a start with many would flood the engine."""

    def __init__(self, featurize: Featurizer, cache: FeatureCache, settings: RouterSettings) -> None:
        self._featurize = featurize
        self._cache = cache
        self._settings = settings
        self._turn = asyncio.Lock()

    async def of_expert(
        self, name: str, digest: str, exemplars: Sequence[str], key: str, wanted: Callable[[], bool]
    ) -> Entry | None:
        """None if no exemplar is more than blank.

        Args:
            key: identifies the exemplars.
            wanted: asked now and then whether to go on.

        Raises:
            SwitchyardError: the featurizer failed, or gives what nothing can be fitted to.
            OvertakenError: the entry is not wanted any more.
        """
        given = self._settings
        texts = _evenly([text for text in dict.fromkeys(exemplars) if text.strip()], given.max_exemplars)
        if not texts:
            return None
        forms = {text: text for text in texts}
        if given.frames:
            forms = await asyncio.to_thread(variants, texts, frames=given.frames)
        entry = await self._fitted(name, digest, list(forms), f"{key}/{given.frames}", given.centres, wanted)
        place = {text: i for i, text in enumerate(texts)}
        origins = np.array([place[text] for text in forms.values()], dtype=np.int16)
        return replace(entry, examples=tuple(forms[text] for text in entry.examples), origins=origins)

    async def background(self) -> Entry:
        """What is no expert's; raises as `of_expert`."""
        texts, most = background_texts(), self._settings.background_centres
        return await self._fitted(BACKGROUND, BACKGROUND, texts, background_key(), most, lambda: True)

    async def _fitted(
        self, name: str, digest: str, texts: Sequence[str], key: str, centres: int, wanted: Callable[[], bool]
    ) -> Entry:
        features = await self._features(texts, key, wanted)
        profile = await asyncio.to_thread(fit_profile, features, centres=centres, seed=self._settings.seed)
        return Entry(name, digest, key, profile, tuple(texts[row] for row in profile.medoids))

    async def _features(self, texts: Sequence[str], key: str, wanted: Callable[[], bool]) -> Features:
        key = features_key(key, len(texts))
        features = await asyncio.to_thread(self._cache.load, key, len(texts))
        if features is None:
            async with self._turn:
                features = await featurize_all(self._featurize, texts, self._settings.feature_batch, wanted)
            await asyncio.to_thread(self._cache.save, key, features)
        return features


def _evenly(texts: list[str], most: int) -> list[str]:
    """At most `most` of the texts, evenly spread: exemplars are often sorted by kind."""
    if len(texts) <= most:
        return texts
    return [texts[i] for i in np.linspace(0, len(texts) - 1, most).round().astype(int)]
