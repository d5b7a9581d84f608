"""Which layer's hidden states should routing use, over how many tokens, and how far may a prompt be from an expert?

`python -m bench.routing_layers --base FOLDER` routes held-out prompts of the eight example tasks and 200 unrelated
prompts with Auto-Switch (no learned metric, exemplars as they are), on features of several depths of the real base.
Prompts come as their task writes them ("templated") and without the instruction ("bare": truly ambiguous for the two
numeral tasks, which are left out).
Features are kept under `.cache/bench/`, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from bench.hidden_states import WHOLE, HiddenStates, Place, costs
from bench.report import Bar, Row, bar, show, write
from bench.unrelated import CACHE, everyday_prompts, unrelated_prompts
from examples.build import load_rows
from examples.tasks import TASKS
from router.decision import Reason
from router.features import FeatureCache, Features
from router.index import Entry, Snapshot
from router.metric import MetricKind, Standardised
from router.mix import Votes
from router.profile import fit_profile
from router.router import Router
from router.settings import RouterSettings
from store.fingerprint import manifest_of

LAYERS = (0, 2, 4, 8, 12, 16, 20, 24, 30)
WINDOWS = (24, 64, 256)
LAYER, TOKENS = 4, 24
"""What the server should use, by this benchmark's figures."""
AUTO_SWITCH = RouterSettings(metric=MetricKind.PLAIN, votes=Votes.COUNT, frames=0, margin=1.0)
AMBIGUOUS = ("num_fr", "num_es")
ROUNDS = 7


@dataclass(frozen=True)
class Prompts:
    """What is routed: `test` and `bare` by task, and prompts that belong to no task."""

    exemplars: dict[str, list[str]]
    test: dict[str, list[str]]
    bare: dict[str, list[str]]
    unrelated: list[str]

    @classmethod
    def load(cls, *, quick: bool) -> Prompts:
        """All tasks with 100 exemplars and 100 held-out prompts each; a few of each if `quick`."""
        tasks = list(TASKS)[:4] if quick else list(TASKS)
        exemplars, test = (40, 5) if quick else (100, 100)
        rows = {name: load_rows(TASKS[name], "test")[:test] for name in tasks}
        return cls(
            {name: TASKS[name].split().exemplars[:exemplars] for name in tasks},
            {name: [row["prompt"] for row in rows[name]] for name in tasks},
            {name: [bare(row["prompt"]) for row in rows[name]] for name in tasks if name not in AMBIGUOUS},
            unrelated_prompts()[:20] if quick else unrelated_prompts(),
        )

    @property
    def groups(self) -> list[list[str]]:
        """Every list of texts that needs features."""
        return [*self.exemplars.values(), *self.test.values(), *self.bare.values(), self.unrelated]


def bare(prompt: str) -> str:
    """A prompt without the sentence that says what to do: `What language is this text? abc` → `abc`."""
    if '"' in prompt.split("?")[0]:  # the question quotes its object, as cron's does
        return prompt.split('"')[1]
    return prompt.split("? ", 1)[1]


def all_features(prompts: Prompts, base: Path, layers: Sequence[int]) -> dict[Place, dict[str, Features]]:
    """`{place: {text: [e]}}` of every prompt; the base is loaded only if something is not cached."""
    fingerprint = manifest_of(base, None).fingerprint
    caches = {
        (layer, window): FeatureCache(CACHE / "features", fingerprint, layer, variant=f"float32, {window} tokens")
        for layer in layers
        for window in WINDOWS
    }
    states: HiddenStates | None = None
    found: dict[Place, dict[str, Features]] = {place: {} for place in caches}
    for texts in track(prompts.groups, "features"):
        key = hashlib.sha256("\0".join(texts).encode()).hexdigest()
        rows = {place: cache.load(key, len(texts)) for place, cache in caches.items()}
        if any(features is None for features in rows.values()):
            states = states or HiddenStates(base, layers, WINDOWS)
            computed = states.features(texts)
            for place, cache in caches.items():
                cache.save(key, computed[place])
            rows = dict(computed)
        for place, features in rows.items():
            assert features is not None
            found[place].update(zip(texts, features, strict=True))
    return found


async def quality(prompts: Prompts, features: Mapping[str, Features], settings: RouterSettings) -> dict[str, float]:
    """Shares of prompts (0 to 1) that the router sends where they belong, and astray."""

    async def featurize(texts: Sequence[str]) -> Features:
        return np.stack([features[text] for text in texts])

    with tempfile.TemporaryDirectory() as scratch:
        router = Router(featurize, FeatureCache(Path(scratch), "", 0), settings)
        for name, exemplars in prompts.exemplars.items():
            await router.add_expert(name, name, exemplars, name)

    async def outcomes(groups: Mapping[str, Sequence[str]]) -> tuple[float, float]:
        """(right, rejected), means over the groups."""
        right, rejected = [], []
        for name, texts in groups.items():
            decisions = [await router.route(text) for text in texts]
            right.append(sum(d.mix.parts == ((name, 1.0),) for d in decisions) / len(texts))
            rejected.append(sum(d.code is Reason.OUT_OF_DOMAIN for d in decisions) / len(texts))
        return statistics.mean(right), statistics.mean(rejected)

    right, rejected = await outcomes(prompts.test)
    bare_right, bare_rejected = await outcomes(prompts.bare)
    everyday = [text for text in prompts.unrelated if text in set(everyday_prompts())]
    return {
        "right": right,
        "rejected": rejected,
        "bare right": bare_right,
        "bare rejected": bare_rejected,
        "unrelated to base": (await outcomes({"": prompts.unrelated}))[1],
        "everyday to base": (await outcomes({"": everyday}))[1],
    }


def scale(experts: int, *, centres: int = 20, width: int = 576) -> dict[str, float]:
    """Medians for a library of synthetic experts: building its snapshot (s), one search (ms)."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Features:
        values: Features = rng.standard_normal(shape, dtype=np.float32)
        return values

    entries = []
    for i in range(experts):
        profile = fit_profile(3 * normal(width) + normal(centres, width), centres=centres, seed=0)
        entries.append(Entry(f"expert-{i}", f"digest-{i}", "", profile, ("",) * centres))
    metric = Standardised.fit([entry.profile.variance for entry in entries])
    given = AUTO_SWITCH
    builds, searches = [], []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        snapshot = Snapshot(entries, metric, None, quantile=given.quantile, margin=given.margin)
        builds.append(time.perf_counter() - start)
    for query in normal(100, width):
        start = time.perf_counter()
        snapshot.search(query, given.neighbours)
        searches.append(1e3 * (time.perf_counter() - start))
    return {"build s": statistics.median(builds), "search ms": statistics.median(searches)}


def layer_rows(
    prompts: Prompts, places: Mapping[Place, Mapping[str, Features]], cost: Mapping[Place, float]
) -> list[Row]:
    """One row per layer and window."""
    rows: list[Row] = []
    for (layer, window), features in track(places.items(), "routing"):
        took = {"ms": cost[layer, window], "of a forward": cost[layer, window] / cost[WHOLE]}
        shares = asyncio.run(quality(prompts, features, AUTO_SWITCH))
        rows.append({"layer": layer, "tokens": window, **shares, **took})
    return rows


def setting_rows(prompts: Prompts, features: Mapping[str, Features]) -> list[Row]:
    """At the chosen place: what the margin and the number of exemplars do."""
    rows: list[Row] = []
    for margin, most in ((0.9, 100), (1.0, 100), (1.1, 100), (1.2, 100), (1.0, 40), (1.0, 20), (1.0, 10)):
        fewer = {name: texts[:most] for name, texts in prompts.exemplars.items()}
        given = replace(prompts, exemplars=fewer)
        shares = asyncio.run(quality(given, features, replace(AUTO_SWITCH, margin=margin)))
        rows.append({"margin": margin, "exemplars": most, **shares})
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.routing_layers", description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="base folder (safetensors)")
    parser.add_argument("--quick", action="store_true", help="few prompts, layers and experts; nothing written")
    args = parser.parse_args()
    torch.set_num_threads(1)
    layers = (0, 2, LAYER) if args.quick else LAYERS
    prompts = Prompts.load(quick=args.quick)
    places = all_features(prompts, args.base, layers)
    by_layer = layer_rows(prompts, places, costs(args.base, layers, WINDOWS))
    by_setting = setting_rows(prompts, places[LAYER, TOKENS])
    sizes = (8, 100) if args.quick else (8, 100, 1000)
    by_size: list[Row] = [{"experts": size, "centres each": 20, **scale(size)} for size in sizes]
    (chosen,) = (row for row in by_layer if (row["layer"], row["tokens"]) == (LAYER, TOKENS))
    bars = bars_of(chosen, by_size[-1])
    show(by_layer, title="routing by layer and window")
    show(by_setting, title=f"layer {LAYER}, {TOKENS} tokens")
    show(by_size, bars, title="size of the library")
    if not args.quick:
        write(
            "routing_layers", "python -m bench.routing_layers --base FOLDER", [*by_layer, *by_setting, *by_size], bars
        )


def bars_of(chosen: Row, largest: Row) -> list[Bar]:
    """The goals for the chosen layer and window, and for the largest library."""
    at = f"layer {LAYER}, {TOKENS} tokens: "
    return [
        bar("routing.right", at + "held-out prompts sent to their own expert", _number(chosen["right"]), ">=", 0.95),
        bar("routing.rejected", at + "held-out prompts sent to the base", _number(chosen["rejected"]), "<=", 0.02),
        bar(
            "routing.fallback",
            at + "unrelated prompts sent to the base",
            _number(chosen["unrelated to base"]),
            ">=",
            0.90,
        ),
        bar(
            "routing.rebuild",
            f"seconds to rebuild {largest['experts']} experts × 20 centres",
            _number(largest["build s"]),
            "<=",
            1.0,
        ),
    ]


def _number(value: object) -> float:
    assert isinstance(value, float)
    return value


if __name__ == "__main__":
    main()
