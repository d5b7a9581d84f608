"""How well, and how fast, does `model: auto` find the expert that one would have named?

`python -m bench.routing --base FOLDER` routes held-out prompts of the eight example tasks in three forms (see
`bench.routing_prompts`) and 500 prompts of no task with the real router: Auto-Switch, Auto-FlexSwitch's loss, and the
discriminant that the server uses. Then it adds noise experts up to a thousand, and times searches among 1,000 and
10,000 experts. Features are kept under `.cache/bench/`.

The background texts were written for this project, by hand, and the second half of them after seeing which *kinds* of
unrelated prompts the first half let through (prose, sums, logs, search words); lines close to one of the 500 were
taken out again.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import faiss
import numpy as np
import torch

from bench.hidden_states import WHOLE, Place, costs
from bench.report import Bar, Row, bar, show, write
from bench.routing_features import KeptFeatures
from bench.routing_prompts import FORMS, RoutingPrompts
from router.background import background_texts
from router.decision import Reason
from router.features import FeatureCache, Features, Featurizer
from router.index import Entry, Snapshot
from router.metric import LowRank, MetricKind
from router.mix import Votes
from router.profile import fit_profile
from router.router import Router
from router.settings import RouterSettings
from router.variants import variants

PLACES: tuple[Place, ...] = ((4, 24), (6, 24))
PLACE: Place = (6, 24)
"""What the server uses."""
AUTO_SWITCH = RouterSettings(metric=MetricKind.PLAIN, votes=Votes.COUNT, frames=0, margin=1.0)
SEARCHES = 200
NOISE_EXEMPLARS = 40


def texts_of(prompts: RoutingPrompts) -> Iterable[str]:
    """Everything whose features are needed."""
    yield from background_texts()
    for exemplars in prompts.exemplars.values():
        yield from variants(exemplars, frames=RouterSettings.frames)
    for form in FORMS:
        for texts in prompts.test[form].values():
            yield from texts
    yield from prompts.unrelated


async def taught(prompts: RoutingPrompts, featurize: Featurizer, given: RouterSettings, folder: Path) -> Router:
    """A router that knows the tasks' experts."""
    router = Router(featurize, FeatureCache(folder, "", 0), given)
    for name, exemplars in prompts.exemplars.items():
        await router.add_expert(name, name, exemplars, name)
    await router.settled()
    return router


async def quality(router: Router, prompts: RoutingPrompts) -> dict[str, float]:
    """Shares of prompts: of each form those sent to their own expert and to the base, and of no task to the base."""
    found: dict[str, float] = {}
    for form in FORMS:
        right, base = [], []
        for name, texts in prompts.test[form].items():
            decisions = [await router.route(text) for text in texts]
            right.append(sum(d.mix.parts == ((name, 1.0),) for d in decisions) / len(texts))
            base.append(sum(d.mix.is_base for d in decisions) / len(texts))
        found[form] = statistics.mean(right)
        found[f"{form} to base"] = statistics.mean(base)
    codes = [(await router.route(text)).code for text in prompts.unrelated]
    found["unrelated to base"] = sum(code is not Reason.MATCHED for code in codes) / len(codes)
    return found


async def method_rows(prompts: RoutingPrompts, kept: KeptFeatures, folder: Path) -> list[Row]:
    """One row per method and place."""
    rows: list[Row] = []
    for place in PLACES:
        for given in (AUTO_SWITCH, RouterSettings(metric=MetricKind.FLEX), RouterSettings()):
            router = await taught(prompts, kept.at(place), given, folder / f"{place[0]}")
            shares = await quality(router, prompts)
            rows.append({"layer": place[0], "tokens": place[1], "metric": str(given.metric), **shares})
    return rows


async def library_rows(prompts: RoutingPrompts, kept: KeptFeatures, folder: Path, sizes: Sequence[int]) -> list[Row]:
    """The same prompts in libraries filled up with noise experts.

    A noise expert's exemplars scatter like those of a real one around a point that lies as far from the real ones as
    they lie from each other: a background text's features, moved by the difference of two others.
    """
    rng = np.random.default_rng(0)
    plain = kept.at(PLACE)
    general = await plain(background_texts())
    real = await plain([text for exemplars in prompts.exemplars.values() for text in exemplars])
    mean = real.mean(axis=0)
    made: dict[str, Features] = {}

    async def featurize(texts: Sequence[str]) -> Features:
        return np.stack([made[text] if text in made else (await plain([text]))[0] for text in texts])

    router = await taught(prompts, featurize, RouterSettings(), folder / "library")
    rows: list[Row] = [{"experts": len(prompts.exemplars), **await quality(router, prompts)}]
    count = len(prompts.exemplars)
    for size in sizes:
        for i in range(count, size):
            a, b, c = general[rng.choice(len(general), 3, replace=False)]
            spread = real[rng.choice(len(real), NOISE_EXEMPLARS)] - mean
            texts = [f"{i}/{j}" for j in range(NOISE_EXEMPLARS)]
            made.update(zip(texts, a + (b - c) + 0.5 * spread, strict=True))
            for form in set(variants(texts, frames=RouterSettings.frames)) - set(texts):
                made[form] = made[texts[rng.integers(len(texts))]] + 0.1 * spread[0]
            await router.add_expert(f"noise-{i}", f"noise-{i}", texts, f"noise-{i}")
        count = size
        start = time.perf_counter()
        await router.settled()
        rows.append({"experts": size, "fit s": time.perf_counter() - start, **await quality(router, prompts)})
    return rows


def search_row(experts: int, *, centres: int = 20, rank: int = 32, width: int = 576) -> Row:
    """Milliseconds of one search among experts × centres in r dimensions, on one thread."""
    rng = np.random.default_rng(0)
    faiss.omp_set_num_threads(1)
    shared = fit_profile(rng.normal(size=(centres, width)).astype(np.float32), centres=centres, seed=0)
    metric = LowRank(np.zeros(width, np.float32), rng.normal(size=(rank, width)).astype(np.float32) / width**0.5)
    entries = [Entry(f"{i}", f"{i}", f"{i}", shared, ("",) * centres) for i in range(experts)]
    snapshot = Snapshot(entries, metric, None, quantile=0.98, margin=1.0)
    took = []
    for query in rng.normal(size=(SEARCHES, width)).astype(np.float32):
        start = time.perf_counter()
        snapshot.search(query, RouterSettings.neighbours)
        took.append(1e3 * (time.perf_counter() - start))
    return {"experts": experts, "centres each": centres, "rank": rank, "search p50 ms": statistics.median(took)}


def bars_of(methods: Sequence[Row], libraries: Sequence[Row], searches: Sequence[Row], cost: float) -> list[Bar]:
    """The goals, for the place and metric that the server uses."""
    rows = {(row["layer"], row["metric"]): row for row in methods}
    chosen = rows[PLACE[0], str(MetricKind.DISCRIMINANT)]
    plain = rows[PLACE[0], str(MetricKind.PLAIN)]

    def value(row: Row, key: str) -> float:
        found = row[key]
        assert isinstance(found, float)
        return found

    fall = max(value(libraries[0], form) - value(libraries[-1], form) for form in FORMS[:2])
    large, largest = searches
    return [
        bar("router.templated", "templated prompts sent to their own expert", value(chosen, "templated"), ">=", 0.995),
        bar("router.bare", "bare prompts sent to their own expert", value(chosen, "bare"), ">=", 0.95),
        bar(
            "router.gain",
            "bare prompts: gain over Auto-Switch",
            value(chosen, "bare") - value(plain, "bare"),
            ">=",
            0.0,
        ),
        bar(
            "router.unrelated", "500 unrelated prompts sent to the base", value(chosen, "unrelated to base"), ">=", 0.95
        ),
        bar("router.rejected", "templated prompts sent to the base", value(chosen, "templated to base"), "<=", 0.02),
        bar("router.rejected.bare", "bare prompts sent to the base", value(chosen, "bare to base"), "<=", 0.02),
        bar("router.features", "cost of the features: share of a 64-token forward", cost, "<=", 0.15),
        bar("router.search", "search among 1,000 × 20 centres, ms (p50)", value(large, "search p50 ms"), "<=", 1.0),
        bar("router.search.10k", "search among 10,000 × 20 centres, ms", value(largest, "search p50 ms"), "<=", 5.0),
        bar("router.library", "accuracy lost in a library of 1,000 experts", fall, "<=", 0.01),
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.routing", description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="base folder (safetensors)")
    parser.add_argument("--quick", action="store_true", help="few prompts and experts; nothing written")
    args = parser.parse_args()
    torch.set_num_threads(1)
    prompts = RoutingPrompts.load(quick=args.quick)
    kept = KeptFeatures(args.base, PLACES)
    kept.compute(texts_of(prompts))
    with tempfile.TemporaryDirectory() as folder:
        methods = asyncio.run(method_rows(prompts, kept, Path(folder)))
        sizes = (50,) if args.quick else (100, 1000)
        libraries = asyncio.run(library_rows(prompts, kept, Path(folder), sizes))
    searches = [search_row(1000), search_row(10_000)]
    taken = costs(args.base, (PLACE[0],), (PLACE[1],))
    bars = bars_of(methods, libraries, searches, taken[PLACE] / taken[WHOLE])
    show(methods, title="routing by method")
    show(libraries, title="size of the library")
    show(searches, bars, title="one search")
    if not args.quick:
        write("routing", "python -m bench.routing --base FOLDER", [*methods, *libraries, *searches], bars)


if __name__ == "__main__":
    main()
