"""The face: experts come and go while prompts are routed."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.decision import Decision, Reason
from router.features import FeatureCache
from router.index import Entry
from router.metric import Metric, MetricKind
from router.mix import MixMode
from router.options import RouteOptions
from router.router import Router
from router.settings import RouterSettings
from router.state import StateFile
from store.errors import SwitchyardError
from tests.router.world import WIDTH, World, add, texts

TOPICS = ("cron", "french", "spam", "poems")
Story = Callable[[World, Router], Awaitable[None]]


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    return FeatureCache(tmp_path / "features", "fingerprint", 4)


def play(cache: FeatureCache, story: Story, **given_settings: object) -> None:
    async def run() -> None:
        world = World()
        async with asyncio.timeout(60):
            await story(world, world.router(cache, **given_settings))

    asyncio.run(run())


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0)


def chosen(decision: Decision) -> list[str]:
    return [name for name, _, _ in decision.parts]


def test_prompts_find_their_expert(cache: FeatureCache) -> None:
    async def story(_: World, router: Router) -> None:
        for topic in TOPICS:
            await add(router, topic)
        assert router.experts == tuple(sorted(TOPICS))
        for topic in TOPICS:
            decision = await router.route(f"{topic} 1000")
            assert decision.parts == ((topic, f"digest-{topic}", 1.0),)
            assert decision.code is Reason.MATCHED
        assert (await router.route("unheard of")).code is Reason.OUT_OF_DOMAIN

    play(cache, story)


def test_soft_mixes_are_a_setting(cache: FeatureCache) -> None:
    async def story(world: World, router: Router) -> None:
        # Two experts for one domain, as two teams would upload them.
        await router.add_expert("ours", "X", texts("cron", 40), "ours")
        await router.add_expert("theirs", "Y", texts("cron", 40, start=40), "theirs")
        mixes = [await router.route(f"cron {i}") for i in range(1000, 1020)]
        assert any(len(decision.parts) == 2 for decision in mixes)
        assert all(sum(weight for _, weight in decision.mix.parts) == pytest.approx(1) for decision in mixes)
        assert len({decision.mix for decision in mixes}) <= 6
        hard = world.router(cache, quantile=1.0, margin=1.5)
        await hard.add_expert("ours", "X", texts("cron", 40), "ours")
        await hard.add_expert("theirs", "Y", texts("cron", 40, start=40), "theirs")
        assert all([len((await hard.route(f"cron {i}")).parts) == 1 for i in range(1000, 1020)])

    play(cache, story, mode=MixMode.SOFT, quantile=1.0, margin=1.5)


def test_without_experts_nothing_is_computed(cache: FeatureCache) -> None:
    async def story(world: World, router: Router) -> None:
        assert (await router.route("cron 1")).code is Reason.NO_EXPERTS
        assert world.asked == []

    play(cache, story)


@pytest.mark.parametrize("prompt", ["", "  \n\t"])
def test_an_empty_prompt_is_the_bases(cache: FeatureCache, prompt: str) -> None:
    async def story(world: World, router: Router) -> None:
        await add(router, "cron")
        before = len(world.asked)
        decision = await router.route(prompt)
        assert decision.mix.is_base
        assert decision.code is Reason.EMPTY_PROMPT
        assert len(world.asked) == before

    play(cache, story)


@pytest.mark.parametrize("exemplars", [[], ["", "  "]])
def test_without_exemplars_an_expert_is_not_found(cache: FeatureCache, exemplars: list[str]) -> None:
    async def story(_: World, router: Router) -> None:
        await add(router, "cron")
        await router.add_expert("named only", "X", exemplars, "none")
        assert router.experts == ("cron",)
        await router.add_expert("cron", "X", exemplars, "none")  # its new version has none
        assert (await router.route("cron 1")).code is Reason.NO_EXPERTS

    play(cache, story)


def test_a_single_expert_knows_its_domain(cache: FeatureCache) -> None:
    async def story(_: World, router: Router) -> None:
        await add(router, "cron", 60)
        decisions = [await router.route(text) for text in texts("cron", 100, start=1000)]
        assert sum(decision.code is Reason.MATCHED for decision in decisions) >= 90
        assert all([(await router.route(f"{i} thing")).mix.is_base for i in range(50)])

    play(cache, story)


def test_a_single_exemplar_finds_itself(cache: FeatureCache) -> None:
    async def story(_: World, router: Router) -> None:
        await add(router, "cron", 1)
        assert chosen(await router.route("cron 0")) == ["cron"]
        assert (await router.route("cron 1")).mix.is_base
        await add(router, "spam", 40)  # lends it a reach
        assert chosen(await router.route("cron 0")) == ["cron"]
        assert chosen(await router.route("spam 0")) == ["spam"]
        assert (await router.route("unheard of")).mix.is_base

    play(cache, story)


def test_few_exemplars_stand_their_ground(cache: FeatureCache) -> None:
    """3 of the 10 nearest centres are the expert's own, 7 are another's, far away."""

    async def story(_: World, router: Router) -> None:
        await add(router, "cron", 3)
        await add(router, "spam", 100)
        decisions = [await router.route(text) for text in texts("cron", 50, start=1000)]
        assert all(chosen(decision) in (["cron"], []) for decision in decisions)
        assert chosen(await router.route("cron 1")) == ["cron"]

    play(cache, story)


def test_repeated_exemplars_count_once(cache: FeatureCache) -> None:
    async def story(world: World, router: Router) -> None:
        await router.add_expert("cron", "X", texts("cron", 40) * 5, "repeated")
        assert sum(map(len, world.asked)) == 40
        await add(router, "spam")
        plain = world.router(cache)
        await router.add_expert("cron", "X", texts("cron", 40), "plain")
        await plain.add_expert("cron", "X", texts("cron", 40), "plain")
        await add(plain, "spam")
        await asyncio.gather(router.settled(), plain.settled())
        for i in range(20):
            assert await router.route(f"cron {i}") == await plain.route(f"cron {i}")

    play(cache, story)


def test_equal_exemplars_are_no_trouble(cache: FeatureCache) -> None:
    async def story(_: World, router: Router) -> None:
        async def constant(given: object) -> object:
            return np.ones((len(given), WIDTH), dtype=np.float32)  # type: ignore[arg-type]

        flat = Router(constant, cache, RouterSettings(metric=MetricKind.PLAIN, frames=0))  # type: ignore[arg-type]
        await add(flat, "cron", 10)
        assert chosen(await flat.route("anything")) == ["cron"]

    play(cache, story)


def test_too_many_exemplars_are_thinned_evenly(cache: FeatureCache) -> None:
    async def story(world: World, router: Router) -> None:
        await add(router, "cron", 100)
        asked = [text for batch in world.asked for text in batch]
        assert asked == [f"cron {i}" for i in (0, 11, 22, 33, 44, 55, 66, 77, 88, 99)]
        assert max(map(len, world.asked)) == 4

    play(cache, story, max_exemplars=10, feature_batch=4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=8, deadline=None)
@given(order=st.permutations(TOPICS), detour=st.lists(st.sampled_from((*TOPICS, "extra")), max_size=4))
def test_history_does_not_matter(cache: FeatureCache, order: list[str], detour: list[str]) -> None:
    prompts = [f"{topic} {i}" for topic in (*TOPICS, "unheard") for i in range(1000, 1003)]

    async def story(world: World, router: Router) -> None:
        for topic in TOPICS:
            await add(router, topic)
        for topic in detour:
            await add(router, topic, 25, name=f"detour {topic}")
            await router.route("cron 1")
        for topic in detour:
            router.remove_expert(f"detour {topic}")
        other = world.router(cache)
        await asyncio.gather(*(add(other, topic) for topic in order))
        await asyncio.gather(router.settled(), other.settled())
        for prompt in prompts:
            assert await router.route(prompt) == await other.route(prompt)

    play(cache, story)


def test_removal_is_seen_at_once(cache: FeatureCache) -> None:
    async def story(_: World, router: Router) -> None:
        await add(router, "cron")
        await add(router, "spam")
        assert chosen(await router.route("cron 1")) == ["cron"]
        router.remove_expert("cron")
        assert (await router.route("cron 1")).code is Reason.OUT_OF_DOMAIN
        router.remove_expert("spam")
        assert (await router.route("spam 1")).code is Reason.NO_EXPERTS
        router.remove_expert("never heard of")

    play(cache, story)


def test_removal_during_a_decision_is_seen(cache: FeatureCache) -> None:
    async def story(world: World, router: Router) -> None:
        await add(router, "cron")
        world.open.clear()
        deciding = asyncio.create_task(router.route("cron 1"))
        await until(lambda: world.asked[-1] == ["cron 1"])
        router.remove_expert("cron")
        world.open.set()
        assert (await deciding).code is Reason.NO_EXPERTS

    play(cache, story)


def test_two_names_of_one_expert(cache: FeatureCache) -> None:
    async def story(_: World, router: Router) -> None:
        await add(router, "cron")
        await add(router, "cron", name="cron-latest")
        await add(router, "spam")
        assert router.experts == ("cron", "cron-latest", "spam")
        assert (await router.route("cron 1")).parts == (("cron", "digest-cron", 1.0),)
        router.remove_expert("cron")
        assert (await router.route("cron 1")).parts == (("cron-latest", "digest-cron", 1.0),)

    play(cache, story)


def test_a_name_moves_to_another_expert(cache: FeatureCache) -> None:
    async def story(_: World, router: Router) -> None:
        await add(router, "cron", name="mine")
        await router.add_expert("mine", "digest-2", texts("spam", 40), "key-2")
        assert (await router.route("spam 1")).parts == (("mine", "digest-2", 1.0),)
        assert (await router.route("cron 1")).mix.is_base

    play(cache, story)


def test_routing_goes_on_while_an_expert_is_added(cache: FeatureCache) -> None:
    async def story(world: World, router: Router) -> None:
        await add(router, "cron")
        held = asyncio.Event()
        plain = world.featurize

        async def featurize(given: list[str]) -> object:
            if given[0].startswith("spam") and len(given) > 1:
                await held.wait()
            return await plain(given)

        router._entries._featurize = featurize  # type: ignore[assignment]
        adding = asyncio.create_task(add(router, "spam"))
        for _ in range(5):
            assert chosen(await router.route("cron 1")) == ["cron"]
            assert (await router.route("spam 1")).mix.is_base
        assert not adding.done()
        held.set()
        await adding
        assert chosen(await router.route("spam 1")) == ["spam"]

    play(cache, story)


def test_additions_and_decisions_may_overlap(cache: FeatureCache) -> None:
    async def story(_: World, router: Router) -> None:
        await add(router, "cron")
        stop = asyncio.Event()

        async def ask() -> int:
            asked = 0
            while not stop.is_set():
                assert chosen(await router.route("cron 1000")) == ["cron"]
                asked += 1
            return asked

        async def churn(topic: str) -> None:
            for _ in range(3):
                await add(router, topic)
                assert chosen(await router.route(f"{topic} 1")) == [topic]
                router.remove_expert(topic)
            await add(router, topic)

        asking = asyncio.gather(*(ask() for _ in range(3)))
        await asyncio.gather(*(churn(f"topic-{i}") for i in range(6)))
        stop.set()
        assert min(await asking) > 0
        assert len(router.experts) == 7
        assert all([chosen(await router.route(f"topic-{i} 1")) == [f"topic-{i}"] for i in range(6)])

    play(cache, story)


def test_a_later_change_of_a_name_wins(cache: FeatureCache) -> None:
    async def story(world: World, router: Router) -> None:
        world.open.clear()
        slow = asyncio.create_task(router.add_expert("mine", "old", texts("cron", 20), "old"))
        await until(lambda: world.asked)
        fast = asyncio.create_task(router.add_expert("mine", "new", texts("spam", 20), "new"))
        gone = asyncio.create_task(add(router, "poems"))
        await asyncio.sleep(0.01)
        router.remove_expert("poems")
        world.open.set()
        await asyncio.gather(slow, fast, gone)
        assert router.experts == ("mine",)
        assert (await router.route("spam 1")).parts == (("mine", "new", 1.0),)

    play(cache, story)


def test_a_failed_addition_changes_nothing(cache: FeatureCache) -> None:
    async def story(world: World, router: Router) -> None:
        await add(router, "cron")
        world.failure = SwitchyardError("the engine has failed")
        with pytest.raises(SwitchyardError, match="the engine has failed"):
            await router.add_expert("cron", "new", texts("spam", 20), "new")
        with pytest.raises(SwitchyardError):
            await add(router, "poems")
        world.failure = None
        assert router.experts == ("cron",)
        assert (await router.route("cron 1")).parts == (("cron", "digest-cron", 1.0),)
        await add(router, "poems")
        assert chosen(await router.route("poems 1")) == ["poems"]

    play(cache, story)


def test_a_cancelled_addition_changes_nothing(cache: FeatureCache) -> None:
    async def story(world: World, router: Router) -> None:
        world.open.clear()
        adding = asyncio.create_task(add(router, "cron"))
        await until(lambda: world.asked)
        adding.cancel()
        await asyncio.gather(adding, return_exceptions=True)
        world.open.set()
        assert not router.experts
        await add(router, "cron")
        assert router.experts == ("cron",)

    play(cache, story)


def test_other_widths_are_refused(cache: FeatureCache) -> None:
    async def story(_: World, router: Router) -> None:
        await add(router, "cron")

        async def narrow(given: object) -> object:
            return np.ones((len(given), 3), dtype=np.float32)  # type: ignore[arg-type]

        router._entries._featurize = narrow  # type: ignore[assignment]
        with pytest.raises(SwitchyardError, match="3 dimensions"):
            await add(router, "spam")
        assert router.experts == ("cron",)

    play(cache, story)


def test_a_restart_computes_nothing_again(cache: FeatureCache, tmp_path: Path) -> None:
    async def first(_: World, router: Router) -> None:
        await add(router, "cron")
        await add(router, "spam")

    async def second(world: World, router: Router) -> None:
        await first(world, router)
        assert world.asked == []
        assert chosen(await router.route("spam 1")) == ["spam"]

    async def after_damage(world: World, router: Router) -> None:
        await first(world, router)
        assert sum(map(len, world.asked)) == 40
        assert chosen(await router.route("cron 1")) == ["cron"]
        assert chosen(await router.route("spam 1")) == ["spam"]

    play(cache, first)
    play(cache, second)
    damaged = sorted((tmp_path / "features").iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:100])
    play(cache, after_damage)
    play(cache, second)


LEARNED = {"metric": MetricKind.DISCRIMINANT, "frames": 2, "votes": "inverse", "margin": 3.0}


def test_a_learned_metric_routes_too(cache: FeatureCache) -> None:
    async def story(_: World, router: Router) -> None:
        for topic in TOPICS:
            await add(router, topic)
        await router.settled()
        for topic in TOPICS:
            assert chosen(await router.route(f"{topic} 1000")) == [topic]
        decision = await router.route("How high is the tallest mountain in Africa?")
        assert decision.code is Reason.OUT_OF_DOMAIN

    play(cache, story, **LEARNED)


def held_fits(router: Router) -> threading.Event:
    """From now on the router fits nothing until the event is set."""
    fit, may_fit = router._fit, threading.Event()

    def fit_when_told(entries: Sequence[Entry]) -> Metric:
        assert may_fit.wait(60)
        return fit(entries)

    router._fit = fit_when_told  # type: ignore[method-assign]
    return may_fit


def test_additions_count_before_the_metric_is_fitted_to_them(cache: FeatureCache) -> None:
    async def story(_: World, router: Router) -> None:
        await add(router, "cron")
        await add(router, "spam")
        await router.settled()
        old, may_fit = router._metric, held_fits(router)
        await add(router, "poems")
        assert chosen(await router.route("poems 1")) == ["poems"]
        assert router._snapshot.metric is old
        may_fit.set()
        await router.settled()
        assert router._snapshot.metric is not old
        assert chosen(await router.route("poems 1")) == ["poems"]
        router.remove_expert("poems")
        assert "poems" not in chosen(await router.route("poems 1"))

    play(cache, story, **(LEARNED | {"rank": 2, "background_parts": 1}))


def test_a_metric_that_takes_its_time_is_fitted_in_the_background(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of few experts, too: a wide base takes seconds."""

    async def story(_: World, router: Router) -> None:
        await add(router, "cron")
        await add(router, "spam")
        await router.settled()
        old, may_fit = router._metric, held_fits(router)
        monkeypatch.setattr("router.fitting._QUICK_SECONDS", 0.0)
        await add(router, "poems")
        assert chosen(await router.route("poems 1")) == ["poems"]
        assert router._snapshot.metric is old
        may_fit.set()
        await router.settled()
        assert router._snapshot.metric is not old

    play(cache, story, **LEARNED)


def test_an_addition_that_is_overtaken_asks_for_no_more_features(cache: FeatureCache) -> None:
    async def story(world: World, router: Router) -> None:
        world.open.clear()
        calls = [
            asyncio.create_task(router.add_expert("mine", f"digest-{i}", texts(f"topic{i}", 40), f"key-{i}"))
            for i in range(10)
        ]
        await asyncio.sleep(0.05)
        world.open.set()
        await asyncio.gather(*calls)
        topics = {text.split()[0] for asked in world.asked for text in asked}
        assert "topic9" in topics <= {"topic0", "topic9"}
        assert chosen(await router.route("topic9 1")) == ["mine"]

    play(cache, story)


def test_features_that_nobody_needs_leave_the_disk(cache: FeatureCache, tmp_path: Path) -> None:
    """Those of an earlier version stay, which may be rolled back to."""

    async def story(_: World, router: Router) -> None:
        async def kept(digest: str | None, topic: str) -> int:
            if digest is None:
                router.remove_expert("mine")
            else:
                await router.add_expert("mine", digest, texts(topic, 20), f"key-{topic}")
            return len(list((tmp_path / "features").iterdir()))

        await router.add_expert("other", "digest-o", texts("first", 20), "key-first")
        assert await kept("digest-1", "first") == 1
        assert await kept("digest-1", "second") == 2
        assert await kept("digest-1", "third") == 2
        assert await kept("digest-2", "fourth") == 3
        assert await kept("digest-1", "third") == 3
        assert await kept(None, "") == 1

    play(cache, story)


def test_a_metric_that_cannot_be_fitted_leaves_the_one_before(cache: FeatureCache) -> None:
    async def story(_: World, router: Router) -> None:
        await add(router, "cron")
        await router.settled()
        router._fit = lambda _: 1 / 0  # type: ignore[assignment, method-assign, return-value]
        await add(router, "spam")
        assert chosen(await router.route("spam 1")) == ["spam"]

    play(cache, story, **LEARNED)


def test_nobody_is_told_that_others_have_experts(cache: FeatureCache) -> None:
    async def story(_: World, router: Router) -> None:
        await add(router, "cron")
        nothing: frozenset[str] = frozenset()
        alone = await router.route("x 1", RouteOptions(existing=nothing))
        asked = await router.route("x 1", RouteOptions(allow=nothing))
        assert alone == await World().router(cache).route("x 1")
        assert asked.mix.is_base
        assert asked.reason != alone.reason

    play(cache, story)


def test_a_restart_has_the_metric_at_once(cache: FeatureCache, tmp_path: Path) -> None:
    async def run() -> None:
        world, state = World(), StateFile(tmp_path / "state", "space")
        given = world.router(cache, **LEARNED)._settings
        first = Router(world.featurize, cache, given, state)
        for topic in TOPICS:
            await add(first, topic)
        await first.settled()
        again = Router(world.featurize, cache, given, state)
        for topic in TOPICS[::-1]:
            await add(again, topic)
        again._fit = lambda _: pytest.fail("fitted again")  # type: ignore[method-assign]
        for topic in TOPICS:
            assert await again.route(f"{topic} 1000") == await first.route(f"{topic} 1000")
        await again.settled()

    asyncio.run(run())


def test_a_failing_fit_leaves_the_old_metric(cache: FeatureCache) -> None:
    async def story(_: World, router: Router) -> None:
        await add(router, "cron")
        await add(router, "poems")
        await router.settled()

        def fail(_: object) -> object:
            raise ValueError("singular")

        router._fit = fail  # type: ignore[method-assign, assignment]
        await add(router, "spam")
        before = await router.route("cron 1")
        assert chosen(before) == ["cron"]
        await router.settled()
        assert await router.route("cron 1") == before

    play(cache, story, **(LEARNED | {"rank": 2, "background_parts": 1}))


def test_what_a_request_may_not_use_is_never_a_neighbour(cache: FeatureCache) -> None:
    async def story(_: World, router: Router) -> None:
        await add(router, "cron")
        await add(router, "spam")
        for options in (RouteOptions(deny=frozenset({"cron"})), RouteOptions(allow=frozenset({"spam"}))):
            decision = await router.route("cron 1", options)
            assert decision.mix.is_base
            assert {n.name for n in decision.neighbours} == {"spam"}
            assert chosen(await router.route("spam 1", options)) == ["spam"]
        nobody = await router.route("cron 1", RouteOptions(allow=frozenset({"poems"})))
        assert nobody.code is Reason.NO_EXPERTS
        assert "allows" in nobody.reason

    play(cache, story)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("centres", 0),
        ("neighbours", 0),
        ("rank", 0),
        ("epochs", 0),
        ("frames", -1),
        ("background_centres", 0),
        ("background_parts", 0),
        ("quantile", 0.5),
        ("quantile", 1.1),
        ("margin", 0.0),
        ("margin", float("nan")),
        ("min_share", -0.1),
        ("steps", 0),
        ("max_exemplars", 0),
        ("feature_batch", 0),
    ],
)
def test_senseless_settings_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        RouterSettings(**{name: value})  # type: ignore[arg-type]


def test_no_torch() -> None:
    code = "import sys, router.router; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
