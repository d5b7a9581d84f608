"""How well, and how fast, does `model: auto` find the expert that one would have named?

`python -m bench.routing --base FOLDER --experts FOLDER ...` routes held-out prompts of the eight example tasks in three
forms (see `bench.routing_prompts`) with the real router, by Auto-Switch, Auto-FlexSwitch's loss and the server's
discriminant; 500 prompts of no task that the router was tuned on, and 500 of fifty question sets that it was not; two
turns of conversations; a library of a thousand experts; a second route with the patched model. It scores the tasks
through a running server, and prompts that need two experts. Then it times searches. Features are kept under
`.cache/bench/`.

The background's written texts were written after seeing which *kinds* of the first 500 prompts went astray (prose,
sums, logs, search words); the knobs were set on the same prompts. Of the second 500 nothing but their share was seen.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import torch

from bench.hidden_states import WHOLE, Place, costs
from bench.report import Bar, Row, bar, show, write
from bench.routing_again import again_rows
from bench.routing_features import KeptFeatures
from bench.routing_library import library_rows
from bench.routing_prompts import FORMS, RoutingPrompts
from bench.routing_talk import conversation_rows, follow_ups
from bench.routing_tasks import task_rows
from bench.unrelated import CACHE, everyday_prompts
from examples.tasks import TASKS
from router.background import background_texts
from router.discriminant import Discriminant
from router.features import FeatureCache, Featurizer
from router.index import Entry, Snapshot
from router.metric import MetricKind
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
SIZES, QUICK = (100, 1000), (20,)


def texts_of(prompts: RoutingPrompts) -> Iterable[str]:
    """Everything whose features are needed."""
    yield from background_texts()
    for exemplars in prompts.exemplars.values():
        yield from variants(exemplars, frames=RouterSettings.frames)
    for form in FORMS:
        for texts in prompts.test[form].values():
            yield from texts
    yield from prompts.unrelated
    yield from prompts.held_out
    yield from everyday_prompts()
    for texts in follow_ups().values():
        yield from texts


@dataclass(frozen=True)
class Results:
    """What the bars are read from."""

    methods: Sequence[Row]
    libraries: Sequence[Row]
    searches: Sequence[Row]
    tasks: Sequence[Row]
    cost: float
    """Of the features, as a share of a 64-token forward."""


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
    for kind, texts in (
        ("unrelated", prompts.unrelated),
        ("held-out", prompts.held_out),
        ("everyday", everyday_prompts()),
    ):
        found[f"{kind} to base"] = sum([(await router.route(text)).mix.is_base for text in texts]) / len(texts)
    return found


async def talk_rows(prompts: RoutingPrompts, featurize: Featurizer, folder: Path) -> list[Row]:
    """Conversations, routed as the server does."""
    return await conversation_rows(await taught(prompts, featurize, RouterSettings(), folder / "talk"), prompts)


async def method_rows(prompts: RoutingPrompts, kept: KeptFeatures, folder: Path) -> list[Row]:
    """One row per method and place."""
    rows: list[Row] = []
    for place in PLACES:
        for given in (AUTO_SWITCH, RouterSettings(metric=MetricKind.FLEX), RouterSettings()):
            router = await taught(prompts, kept.at(place), given, folder / f"{place[0]}")
            shares = await quality(router, prompts)
            rows.append({"layer": place[0], "tokens": place[1], "metric": str(given.metric), **shares})
    return rows


def search_row(experts: int, *, centres: int = 20, width: int = 576) -> Row:
    """Milliseconds of one search among experts × centres as the server does it, on one thread.

    The features are noise: no search finds its candidates among few experts.
    """
    rng = np.random.default_rng(0)
    faiss.omp_set_num_threads(1)
    given = RouterSettings()
    noise = rng.normal(size=(400, width)).astype(np.float32)
    background = Entry("", "", "", fit_profile(noise, centres=given.background_centres, seed=0), ("",) * 400)
    entries = []
    for i in range(experts):
        profile = fit_profile(rng.normal(size=(centres, width)).astype(np.float32), centres=centres, seed=0)
        entries.append(Entry(f"{i}", f"{i}", f"{i}", profile, ("",) * centres))
    fitted = [entry.profile for entry in (*entries[:200], background)]
    metric = Discriminant.fit(fitted, given.rank, parts=given.background_parts)
    snapshot = Snapshot(entries, metric, background, quantile=0.98, margin=1.0)
    took = []
    for query in rng.normal(size=(SEARCHES, width)).astype(np.float32):
        start = time.perf_counter()
        snapshot.search(query, given.neighbours)
        took.append(1e3 * (time.perf_counter() - start))
    return {"experts": experts, "centres each": centres, "rank": given.rank, "search p50 ms": statistics.median(took)}


def bars_of(results: Results) -> list[Bar]:
    """The goals, for the place and metric that the server uses."""
    rows = {(row["layer"], row["metric"]): row for row in results.methods}
    chosen = rows[PLACE[0], str(MetricKind.DISCRIMINANT)]
    plain = rows[PLACE[0], str(MetricKind.PLAIN)]

    def value(row: Row, key: str) -> float:
        found = row[key]
        assert isinstance(found, float)
        return found

    def score(form: str, column: str) -> float:
        return statistics.mean(value(row, column) for row in results.tasks if row["form"] == form)

    own = (value(chosen, "templated to base") + value(chosen, "bare to base")) / 2
    gain = value(chosen, "bare") - value(plain, "bare")
    small, large = results.libraries[0], results.libraries[-1]
    say, to_base = "prompts sent to their own expert", "prompts sent to the base"
    search, search_10k = (value(row, "search p50 ms") for row in results.searches)
    found = [
        bar("router.templated", f"templated {say}", value(chosen, "templated"), ">=", 0.995),
        bar("router.bare", f"bare {say}", value(chosen, "bare"), ">=", 0.95),
        bar("router.gain", "bare prompts: gain over Auto-Switch", gain, ">=", 0),
        bar("router.held_out", f"500 held-out unrelated {to_base}", value(chosen, "held-out to base"), ">=", 0.95),
        bar("router.unrelated", f"500 others, tuned on: {to_base}", value(chosen, "unrelated to base"), ">=", 0.95),
        bar("router.rejected", f"templated and bare {to_base}", own, "<=", 0.02),
        bar("router.features", "cost of the features: share of a 64-token forward", results.cost, "<=", 0.15),
        bar("router.search", "search among 1,000 × 20 centres, ms (p50)", search, "<=", 1),
        bar("router.search.10k", "search among 10,000 × 20 centres, ms (p50)", search_10k, "<=", 5),
    ]
    for form in ("templated", "bare"):
        what = f"{form}: accuracy lost among {large['experts']} experts"
        found.append(bar(f"router.library.{form}", what, value(small, form) - value(large, form), "<=", 0.01))
    for form, goal in (("templated", 0.99), ("bare", 0.95)) if results.tasks else ():
        ratio = score(form, "routed") / score(form, "by name")
        found.append(bar(f"router.score.{form}", f"{form}: score through model: auto / by name", ratio, ">=", goal))
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.routing", description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="base folder (safetensors)")
    parser.add_argument("--experts", type=Path, nargs="*", default=[], help="folders of expert files, one per task")
    parser.add_argument("-n", type=int, default=100, help="held-out rows per task that are answered (default 100)")
    parser.add_argument("--quick", action="store_true", help="few prompts and experts; nothing written")
    args = parser.parse_args()
    torch.set_num_threads(1)
    prompts = RoutingPrompts.load(quick=args.quick)
    files = [file for folder in args.experts for file in sorted(folder.glob("*.safetensors")) if file.stem in TASKS]
    kept = KeptFeatures(args.base, PLACES)
    kept.compute(texts_of(prompts))
    plain = kept.at(PLACE)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        methods = asyncio.run(method_rows(prompts, kept, folder))
        show(methods, title="routing by method")
        talks = asyncio.run(talk_rows(prompts, plain, folder))
        show(talks, title="second question of a conversation")
        libraries = asyncio.run(library_rows(prompts, kept, PLACE, folder / "library", QUICK if args.quick else SIZES))
        show(libraries, title="size of the library")
        again = asyncio.run(again_rows(args.base, files, prompts, plain, PLACE, folder / "again"))
        show(again, title="routing again with the patched model")
    searches = [search_row(1000), search_row(10_000)]
    taken = costs(args.base, (PLACE[0],), (PLACE[1],))
    tasks = task_rows(args.base, files, CACHE.parent, 4 if args.quick else args.n) if files else []
    show(tasks, title="scores through the server")
    results = Results(
        methods, libraries, searches, [row for row in tasks if "routed" in row], taken[PLACE] / taken[WHOLE]
    )
    bars = bars_of(results)
    show(searches, bars, title="one search")
    if not args.quick:
        rows = [*methods, *talks, *libraries, *again, *searches, *tasks]
        write("routing", "python -m bench.routing --base FOLDER --experts FOLDER ...", rows, bars)


if __name__ == "__main__":
    main()
