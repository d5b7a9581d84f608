"""Routing again with the features of the model that the first route has patched (MOS's self-refined retrieval).

The centres stay where the pristine base put them. One more pass through the early layers, patched, per prompt is the
price; whether it buys anything is what this measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.hidden_states import HiddenStates, Place
from bench.report import Row
from bench.routing_prompts import FORMS, RoutingPrompts
from router.features import FeatureCache, Features, Featurizer
from router.router import Router
from router.settings import RouterSettings
from store.apply import apply_expert


async def again_rows(
    base: Path, experts: Sequence[Path], prompts: RoutingPrompts, plain: Featurizer, place: Place, folder: Path
) -> list[Row]:
    """Shares of prompts that found their expert at the first try and at the second, by form."""
    patched: dict[str, Features] = {}

    async def featurize(texts: Sequence[str]) -> Features:
        return np.stack([patched[text] if text in patched else (await plain([text]))[0] for text in texts])

    router = Router(featurize, FeatureCache(folder, "", 0), RouterSettings())
    for name, exemplars in prompts.exemplars.items():
        await router.add_expert(name, name, exemplars, name)
    await router.settled()
    asked = [(form, name, text) for form in FORMS for name, texts in prompts.test[form].items() for text in texts]
    first = {text: (await router.route(text)).mix.parts for _, _, text in asked}
    states = HiddenStates(base, [place[0]], [place[1]])
    for file in experts:
        texts = [text for text, parts in first.items() if parts == ((file.stem, 1.0),)]
        if texts:
            weights = {k.removeprefix("model."): v for k, v in apply_expert(file, base).items()}
            states.decoder.load_state_dict(weights, strict=False)
            patched.update(zip((f"again {text}" for text in texts), states.features(texts)[place], strict=True))
    rows: list[Row] = []
    for form in FORMS:
        once, twice = [], []
        for of, name, text in asked:
            if of == form:
                once.append(first[text] == ((name, 1.0),))
                key = f"again {text}"
                twice.append((await router.route(key)).mix.parts == ((name, 1.0),) if key in patched else once[-1])
        rows.append({"form": form, "first route": sum(once) / len(once), "second route": sum(twice) / len(twice)})
    return rows
