"""A world of made-up topics: texts of one topic have features around one point."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Sequence

import numpy as np

from router.features import FeatureCache, Features
from router.index import Entry
from router.profile import fit_profile
from router.router import Router, RouterSettings

WIDTH = 16
SPREAD = 0.3


def feature(text: str) -> Features:
    """`[WIDTH]`: a point that the first word decides, and noise that the whole text decides."""
    centre = np.random.default_rng(zlib.crc32(text.split()[0].encode())).normal(size=WIDTH)
    noise = np.random.default_rng(zlib.crc32(text.encode())).normal(size=WIDTH)
    vector: Features = (centre + SPREAD * noise).astype(np.float32)
    return vector


def texts(topic: str, count: int, start: int = 0) -> list[str]:
    return [f"{topic} {i}" for i in range(start, start + count)]


def entry(topic: str, count: int = 40, *, name: str | None = None, digest: str | None = None) -> Entry:
    features = np.stack([feature(text) for text in texts(topic, count)])
    profile = fit_profile(features, centres=20, folds=4, seed=0)
    return Entry(name or topic, digest or f"digest-{topic}", f"key-{topic}-{count}", profile)


class World:
    """A featurizer that can be held up or made to fail, and that counts."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.failure: Exception | None = None
        self.open = asyncio.Event()
        self.open.set()

    async def featurize(self, given: Sequence[str]) -> Features:
        self.asked.append(list(given))
        await self.open.wait()
        if self.failure is not None:
            raise self.failure
        return np.stack([feature(text) for text in given])

    def router(self, cache: FeatureCache, **settings: object) -> Router:
        return Router(self.featurize, cache, RouterSettings(**settings))  # type: ignore[arg-type]


async def add(router: Router, topic: str, count: int = 40, *, name: str | None = None) -> None:
    await router.add_expert(name or topic, f"digest-{topic}", texts(topic, count), f"key-{topic}-{count}")
