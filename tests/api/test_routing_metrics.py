"""What `/metrics` tells of routing: decisions, how sure they were, drift, and what clients who name experts miss."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from router.decision import Decision, Reason
from router.index import Neighbour
from router.options import ANY, RouteOptions
from server.api.services import Services
from server.choices import Part
from server.metrics import EXPERT_LABELS, Metrics
from server.prompts import Prompt, TextPrompt
from server.routing_metrics import REMEMBERED
from server.shadow import WAITING, Shadow
from store.access import OPERATOR, Caller
from store.errors import SwitchyardError
from store.mix import BASE_MIX, Mix
from tests.api.dummy_engine import DummyEngine
from tests.api.house import CRON, FRENCH, House, make_expert, open_house

pytestmark = pytest.mark.anyio

PART = Part("cron", "c" * 64, 1.0)


def figures(metrics: Metrics) -> dict[str, float]:
    return {
        sample.name + "".join(f"|{value}" for _, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
        if "router" in sample.name
    }


def of(house: House) -> Metrics:
    services: Services = house.app.state.services
    return services.metrics


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(DummyEngine().stats, list)


def matched(name: str, distance: float, *, reach: float = 2.0, code: Reason = Reason.MATCHED) -> Decision:
    near = Neighbour("other", "o" * 64, distance / 2, 1.0, 3, ""), Neighbour(name, name * 9, distance, reach, 3, "")
    return Decision(Mix.of({name * 9: 1.0}), ((name, name * 9, 1.0),), code, "", distance, reach, 0.75, near)


TO_BASE = Decision(BASE_MIX, (), Reason.OUT_OF_DOMAIN, "", 3.0, 2.0, 0.0)


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with open_house(tmp_path, router_shadow=1.0) as house:
        for value, (name, prompts) in enumerate((("cron", CRON), ("french", FRENCH), ("bare", ())), start=1):
            await house.upload(make_expert(tmp_path / name, value=value, name=name, exemplars=tuple(prompts)))
        yield house


async def test_routed_prompts_are_counted(house: House) -> None:
    await house.chat(CRON[2], model="auto")
    await house.complete([CRON[3], FRENCH[2]], model="auto")
    await house.chat("How high is the tallest mountain in Africa?", model="auto")
    await house.complete(" ", model="auto")
    await house.http.post("/v1/route", json={"prompt": CRON[2]})  # asks only
    told = figures(of(house))
    assert told["switchyard_router_decisions_total|matched"] == 3
    assert told["switchyard_router_decisions_total|out_of_domain"] == 1
    assert told["switchyard_router_decisions_total|empty_prompt"] == 1
    assert told["switchyard_router_decisions_total|low_confidence"] == 0
    assert told["switchyard_router_fallbacks_total"] == 2
    assert told["switchyard_router_chosen_total|cron"] == 2
    assert told["switchyard_router_chosen_total|french"] == 1
    assert told["switchyard_router_confidence_count"] == 4
    assert 2 < told["switchyard_router_confidence_sum"] <= 4
    assert 0 < told["switchyard_router_drift|cron"] < 1


async def test_requests_that_name_an_expert_are_routed_in_the_shadow(house: House) -> None:
    shadow = next(chore for chore in house.app.state.services.chores if chore.name == "routing in the shadow")
    await house.chat(CRON[2], model="cron")
    await house.chat(FRENCH[2], model="cron")
    await house.complete([FRENCH[2], "How high is the tallest mountain in Africa?"], model="french", stream=True)
    await house.chat("anything", model="bare")  # cannot be routed to
    await house.chat(CRON[2], model="auto", experts=[{"id": "cron", "weight": 0.5}])
    await house.chat(CRON[2], model="auto")
    await house.chat(CRON[2])
    told: dict[str, float] = {}
    while sum(told.values()) < 4:
        await shadow.work()
        await asyncio.sleep(0.01)  # the server's own turn may be at work on one of them
        told = {name: count for name, count in figures(of(house)).items() if "shadow_total" in name}
    prefix = "switchyard_router_shadow_total"
    assert told == {
        f"{prefix}|cron|agree": 1,
        f"{prefix}|cron|other": 1,
        f"{prefix}|french|agree": 1,
        f"{prefix}|french|base": 1,
    }
    assert figures(of(house))["switchyard_router_decisions_total|matched"] == 1, "nobody was routed by it"


async def test_the_shadow_is_off_unless_asked_for(tmp_path: Path) -> None:
    async with open_house(tmp_path) as house:
        assert "routing in the shadow" not in {chore.name for chore in house.app.state.services.chores}


def test_drift_follows_what_comes(metrics: Metrics) -> None:
    for distance in (0.2, 0.4, 0.6):
        metrics.routing.decided(matched("cron", distance))
    assert figures(metrics)["switchyard_router_drift|cron"] == pytest.approx(0.2), "the first ones, averaged plainly"
    metrics.routing.decided(matched("cron", 50.0, code=Reason.KEPT))
    assert figures(metrics)["switchyard_router_drift|cron"] == pytest.approx(0.2), "'and on Sundays?' is no drift"
    for _ in range(5 * REMEMBERED):
        metrics.routing.decided(matched("cron", 1.8))
    metrics.routing.decided(TO_BASE)
    assert figures(metrics)["switchyard_router_drift|cron"] == pytest.approx(0.9, abs=0.01)
    assert figures(metrics)["switchyard_router_chosen_total|cron"] == 4 + 5 * REMEMBERED


def test_labels_are_bounded(metrics: Metrics) -> None:
    for i in range(EXPERT_LABELS + 20):
        metrics.routing.decided(matched(f"e{i}", 1.0))
        metrics.routing.shadowed(f"e{i}", "d", TO_BASE)
    told = figures(metrics)
    for name in ("chosen_total", "drift"):
        assert len([key for key in told if key.startswith(f"switchyard_router_{name}|")]) == EXPERT_LABELS + 1
    assert told["switchyard_router_chosen_total|other"] == 20
    assert told["switchyard_router_shadow_total|other|base"] == 20


Make = Callable[..., Shadow]


@pytest.fixture
def make(metrics: Metrics) -> tuple[Make, list[str]]:
    asked: list[str] = []

    async def decide(prompt: Prompt, options: RouteOptions, by: Caller) -> Decision:
        asked.append(str(prompt.questions(DummyEngine().tokenizer)[-1]))
        assert (options, by) == (ANY, OPERATOR)
        if "bad" in asked[-1]:
            raise SwitchyardError("cannot")
        return TO_BASE

    def shadow(share: float, draw: Callable[[], float] = lambda: 0.0) -> Shadow:
        return Shadow(share, decide, lambda name: name == "cron", metrics.routing, draw)

    return shadow, asked


async def test_a_share_is_sampled(make: tuple[Make, list[str]]) -> None:
    shadow, asked = make[0](0.25, random.Random(1).random), make[1]
    for i in range(400):
        shadow.consider([TextPrompt(f"{i}")], PART, OPERATOR)
        await shadow.work()
    assert 60 < len(asked) < 140


async def test_what_waits_is_bounded(make: tuple[Make, list[str]]) -> None:
    shadow, asked = make[0](1.0), make[1]
    shadow.consider([TextPrompt("x" * (1 << 17))], PART, OPERATOR)
    shadow.consider([TextPrompt(f"{i}") for i in range(2 * WAITING)], PART, OPERATOR)
    await shadow.work()
    assert asked == [f"{i}" for i in range(WAITING)]
    await shadow.work()
    assert len(asked) == WAITING


async def test_one_that_fails_holds_up_no_other(make: tuple[Make, list[str]], metrics: Metrics) -> None:
    shadow, asked = make[0](1.0), make[1]
    shadow.consider([TextPrompt("a"), TextPrompt("bad"), TextPrompt("b")], PART, OPERATOR)
    await shadow.work()
    assert asked == ["a", "bad", "b"]
    assert figures(metrics)["switchyard_router_shadow_total|cron|base"] == 2
