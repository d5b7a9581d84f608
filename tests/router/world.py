"""A world of made-up topics: texts of one topic have features around one point."""

from __future__ import annotations

import asyncio
import re
import zlib
from collections.abc import Sequence

import numpy as np

from router.features import FeatureCache, Features
from router.index import Entry
from router.metric import MetricKind, Standardised
from router.mix import Votes
from router.profile import fit_profile
from router.router import Router
from router.settings import RouterSettings

WIDTH = 16
SPREAD = 0.3


def feature(text: str) -> Features:
    """`[WIDTH]`: a point that the topic decides (the word before a number, or the first), and noise from all of it."""
    found = re.search(r"(\S+) \d+", text)
    topic = found.group(1) if found else text.split()[0]
    centre = np.random.default_rng(zlib.crc32(topic.encode())).normal(size=WIDTH)
    noise = np.random.default_rng(zlib.crc32(text.encode())).normal(size=WIDTH)
    vector: Features = (centre + SPREAD * noise).astype(np.float32)
    return vector


def texts(topic: str, count: int, start: int = 0) -> list[str]:
    return [f"{topic} {i}" for i in range(start, start + count)]


def entry(topic: str, count: int = 40, *, name: str | None = None, digest: str | None = None) -> Entry:
    features = np.stack([feature(text) for text in texts(topic, count)])
    profile = fit_profile(features, centres=20, seed=0)
    examples = tuple(texts(topic, count)[row] for row in profile.medoids)
    return Entry(
        topic if name is None else name,
        f"digest-{topic}" if digest is None else digest,
        f"key-{topic}-{count}",
        profile,
        examples,
    )


def plain_metric(entries: Sequence[Entry]) -> Standardised:
    known = [e.profile.variance for e in entries if e.profile.is_calibrated]
    return Standardised.fit(known or [entries[0].profile.variance])


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
        """A router without a background and without variants, unless the settings say otherwise."""
        settings = {"metric": MetricKind.PLAIN, "votes": Votes.COUNT, "frames": 0, "margin": 1.0} | settings
        return Router(self.featurize, cache, RouterSettings(**settings))  # type: ignore[arg-type]


async def add(router: Router, topic: str, count: int = 40, *, name: str | None = None) -> None:
    await router.add_expert(name or topic, f"digest-{topic}", texts(topic, count), f"key-{topic}-{count}")
