"""Reports: exemplars are routed as if they were not among the exemplars, and the map shows what the caller may see."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from router.features import FeatureCache
from router.held_out import hold_out
from router.index import Entry, Snapshot
from router.metric import MetricKind, Standardised
from router.options import ANY, RouteOptions
from router.report import Report, Seen
from router.router import Router
from tests.router.world import World, add, entry, feature, plain_metric, texts

TOPICS = ("cron", "french", "spam", "poems")


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    return FeatureCache(tmp_path / "features", "fingerprint", 4)


def play(cache: FeatureCache, story: Callable[[Router], Awaitable[None]], **settings: object) -> None:
    async def run() -> None:
        await story(World().router(cache, **settings))

    asyncio.run(run())


def seen(topic: str, number: int = 1000) -> Seen:
    return Seen(feature(f"{topic} {number}"), f"digest-{topic}")


def names(report: Report) -> list[str]:
    return [row.name for row in report.rows]


@pytest.mark.parametrize("metric", [MetricKind.PLAIN, MetricKind.DISCRIMINANT])
def test_what_lies_apart_is_told_apart(cache: FeatureCache, metric: MetricKind) -> None:
    async def story(router: Router) -> None:
        for topic in TOPICS:
            await add(router, topic)
        report = await router.report([seen("spam"), Seen(feature("elsewhere 1"), None)], ANY, 10)
        assert names(report) == sorted(TOPICS)
        assert report.left_out == 0
        for i, row in enumerate(report.rows):
            assert (sum(row.counts), row.is_held_out) == (8, True), "a fifth"
            assert row.counts[i] >= 7, row
            assert row.centres.shape == (20, 2)
        assert [row.requests for row in report.rows] == [0, 0, 0, 1]
        assert report.seen_names == ("spam", None)
        spam = report.rows[3].centres.mean(axis=0)
        others = [row.centres.mean(axis=0) for row in report.rows[:3]]
        assert all(np.linalg.norm(report.seen[0] - spam) < np.linalg.norm(report.seen[0] - other) for other in others)
        assert len(report.background) == (0 if metric is MetricKind.PLAIN else 140)
        assert 0 < report.spread[1] <= report.spread[0] <= 1

    play(cache, story, metric=metric, margin=3.0)


def test_experts_for_the_same_are_confused(cache: FeatureCache) -> None:
    async def story(router: Router) -> None:
        await router.add_expert("one", "digest-one", texts("cron", 40), "a")
        await router.add_expert("two", "digest-two", texts("cron", 40, start=40), "b")
        await add(router, "french")
        report = await router.report([], ANY, 10)
        assert names(report) == ["french", "one", "two"]
        confused = report.rows[1].counts[2] + report.rows[2].counts[1]
        assert confused > 3, "they share a domain"
        assert report.rows[0].counts[0] == 8

    play(cache, story, margin=3.0)


def test_an_exemplar_is_not_found_by_itself(cache: FeatureCache) -> None:
    """Four texts that have nothing in common: each is its own centre, and would always find itself."""

    async def story(router: Router) -> None:
        odd = [f"{word} {i}" for i, word in enumerate(("ants", "bees", "cows", "dogs"))]
        await router.add_expert("odd", "digest-odd", odd, "odd")
        await add(router, "french")
        for text in odd:
            assert (await router.route(text)).parts[0][0] == "odd"
        report = await router.report([], ANY, 10)
        assert report.rows[1].counts[1] < 4, "left out, none of them tells of another"

    play(cache, story, margin=0.5)


def test_a_fifth_is_held_out_of_all_that_is_fitted(cache: FeatureCache) -> None:
    known = {topic: np.stack([feature(text) for text in texts(topic, 40)]) for topic in TOPICS}
    for topic, features in known.items():
        cache.save(f"key-{topic}-40/40", features)
    entries = [replace(entry(topic), origins=np.arange(40, dtype=np.int16)) for topic in TOPICS]
    alias = replace(entries[0], name="zebra")
    fitted: list[int] = []

    def fit(every: Sequence[Entry]) -> Standardised:
        fitted.extend(one.profile.exemplars for one in every)
        return plain_metric(every)

    held = hold_out(
        entries[:2],
        [*entries, alias],
        cache=cache,
        fit=fit,
        build=lambda every, metric: Snapshot(every, metric, None, quantile=0.98, margin=1.0),
        centres=20,
        seed=0,
    )
    assert fitted == [32, 32, 40, 40, 32]
    assert held.features.keys() == {(one.digest, one.key) for one in entries[:2]}
    assert np.array_equal(held.features["digest-cron", "key-cron-40"], known["cron"][4::5])
    assert [one.profile.exemplars for one in held.snapshot.entries] == [32, 32, 40, 40]
    assert held.snapshot.name_of(held.snapshot.entries[0], lambda name: name == "zebra") == "zebra"


def test_the_search_leaves_one_out() -> None:
    from tests.router.test_index import build

    entries = [entry("cron", 12), entry("french", 12)]
    snapshot = build(entries)
    cron = snapshot.entries[0]
    query = cron.profile.points[3]
    centre = int(cron.profile.members[3])
    size = int(cron.profile.sizes[centre])
    plain = snapshot.search(query, 24)
    without = snapshot.search(query, 24, part_of=(0, centre))
    assert len(without) == (23 if size == 1 else 24)
    assert sorted(n.distance for n in without) == [n.distance for n in without]
    gone = {n.distance for n in plain} - {n.distance for n in without}
    assert len(gone) == 1


def test_nothing_is_told_of_what_the_caller_may_not_find(cache: FeatureCache) -> None:
    async def story(router: Router) -> None:
        for topic in TOPICS:
            await add(router, topic)
        options = RouteOptions(allow=frozenset({"cron", "french"}))
        report = await router.report([seen("spam"), seen("cron")], options, 10)
        assert names(report) == ["cron", "french"]
        assert report.seen_names == (None, "cron")
        assert report.left_out == 0, "others do not exist"
        assert all(row.counts[2] == 0 for row in report.rows)

    play(cache, story)


def test_those_asked_for_are_shown_first(cache: FeatureCache) -> None:
    async def story(router: Router) -> None:
        for i in range(9):
            await add(router, f"topic{i}", 8)
        report = await router.report([seen("topic7"), seen("topic7", 1001), seen("topic3")], ANY, 4)
        assert len(names(report)) == 4
        assert {"topic3", "topic7"} < set(names(report))
        assert report.left_out == 5
        assert names(await router.report([seen("topic7"), seen("topic7", 2), seen("topic3")], ANY, 1)) == ["topic7"]
        assert names(await router.report([], ANY, 3)) == ["topic0", "topic4", "topic8"]
        assert all(len(row.counts) == 6 for row in report.rows)

    play(cache, story)


def test_without_experts_there_is_nothing(cache: FeatureCache) -> None:
    async def story(router: Router) -> None:
        report = await router.report([], ANY, 10)
        assert (report.rows, report.left_out, len(report.seen)) == ((), 0, 0)
        await add(router, "cron", 1)
        (row,) = (await router.report([seen("cron")], ANY, 10)).rows
        assert row.counts == (0, 0, 1), "one exemplar, left out, leaves nothing"

    play(cache, story)
