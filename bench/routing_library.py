"""A library of a thousand experts: do the example tasks still find theirs?

Besides the eight there are real question sets, each an expert with twenty of its questions as exemplars, and copies of
these whose features are moved by half the difference of two other sets: as far apart as sets are, with the spread that
questions of one set have. Frames of a moved exemplar are moved with it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.hidden_states import Place
from bench.report import Row
from bench.routing_features import KeptFeatures
from bench.routing_prompts import FORMS, RoutingPrompts
from bench.unrelated import other_sets
from router.features import FeatureCache, Features
from router.router import Router
from router.settings import RouterSettings
from router.variants import variants

EXEMPLARS, LONGEST = 20, 600
SHIFT = 0.5


def set_exemplars() -> dict[str, list[str]]:
    """Name → exemplars of the question sets."""
    rng = random.Random(7)
    return {
        name: rng.sample(texts, min(EXEMPLARS, len(texts)))
        for name, prompts in other_sets().items()
        if (texts := sorted({prompt[:LONGEST] for prompt in prompts}))
    }


async def library_rows(
    prompts: RoutingPrompts, kept: KeptFeatures, place: Place, folder: Path, sizes: Sequence[int]
) -> list[Row]:
    """Accuracy by form in libraries of the given sizes, and how long the last fit took."""
    sets, frames = set_exemplars(), RouterSettings.frames
    forms = {name: list(variants(texts, frames=frames)) for name, texts in sets.items()}
    kept.compute(text for texts in forms.values() for text in texts)
    plain, moved = kept.at(place), dict[str, Features]()

    async def featurize(texts: Sequence[str]) -> Features:
        return np.stack([moved[text] if text in moved else (await plain([text]))[0] for text in texts])

    means = {name: (await plain(texts)).mean(axis=0) for name, texts in sets.items()}
    router = Router(featurize, FeatureCache(folder, "", 0), RouterSettings())
    for name, exemplars in prompts.exemplars.items():
        await router.add_expert(name, name, exemplars, name)
    rows: list[Row] = [{"experts": len(router.experts), **await _accuracy(router, prompts)}]
    rng, names = np.random.default_rng(0), list(sets)
    for size in sizes:
        for number in range(len(router.experts), size):
            source = names[(number - len(prompts.exemplars)) % len(names)]
            texts = sets[source]
            if number - len(prompts.exemplars) >= len(names):
                one, other = (means[names[i]] for i in rng.choice(len(names), 2, replace=False))
                texts = [f"{number}: {text}" for text in texts]
                of = dict(zip(texts, sets[source], strict=True))
                for form, text in variants(texts, frames=frames).items():
                    known = form.replace(f"{number}: ", "", 1)
                    origin = known if known in forms[source] else of[text]
                    moved[form] = (await plain([origin]))[0] + SHIFT * (one - other)
            await router.add_expert(f"set-{number}", f"set-{number}", texts, f"set-{number}")
        start = time.perf_counter()
        await router.settled()
        took = time.perf_counter() - start
        rows.append({"experts": len(router.experts), **await _accuracy(router, prompts), "fit s": took})
    return rows


async def _accuracy(router: Router, prompts: RoutingPrompts) -> dict[str, float]:
    await router.settled()
    found = {}
    for form in FORMS:
        right = [
            (await router.route(text)).mix.parts == ((name, 1.0),)
            for name, texts in prompts.test[form].items()
            for text in texts
        ]
        found[form] = float(np.mean(right))
    return found
