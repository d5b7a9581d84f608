"""What a client may ask of the routing of `model: auto`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.api.house import CRON, FRENCH, House, error, make_expert, open_house

pytestmark = pytest.mark.anyio


async def test_a_route_may_be_constrained(house: House) -> None:
    assert (await house.chat(CRON[0], model="auto")).headers["x-switchyard-mix"] == "cron=1"
    for routing in ({"deny": ["cron"]}, {"allow": ["french"]}):
        answer = await house.chat(CRON[0], model="auto", routing=routing)
        assert answer.headers["x-switchyard-mix"] == "base", routing
        told = (await house.http.post("/v1/route", json={"prompt": CRON[0], "routing": routing})).json()
        assert "cron" not in {neighbour["id"] for neighbour in told["neighbours"]}
    answer = await house.chat(FRENCH[0], model="auto", routing={"allow": ["french"], "mode": "soft", "max_experts": 1})
    assert answer.headers["x-switchyard-mix"] == "french=1"


async def test_confidence_may_be_demanded(house: House) -> None:
    prompt = "translate into french: run the backup job every 3 minutes"
    told = (await house.http.post("/v1/route", json={"prompt": prompt})).json()
    demanded = {"prompt": prompt, "routing": {"min_confidence": 1.0}}
    strict = (await house.http.post("/v1/route", json=demanded)).json()
    assert (strict["code"] == "low_confidence") == (0 < told["confidence"] < 1.0 and bool(told["mix"]))


async def test_a_conversation_stays_with_its_expert(house: House) -> None:
    vague = [
        {"role": "user", "content": CRON[0]},
        {"role": "assistant", "content": "*/1 * * * *"},
        {"role": "user", "content": "run the backup job"},
    ]
    codes = []
    for sticky in (True, False):
        body = {"messages": vague, "routing": {"sticky": sticky}}
        codes.append((await house.http.post("/v1/route", json=body)).json()["code"])
    assert codes[0] in ("kept", "matched")
    moved = [*vague[:2], {"role": "user", "content": FRENCH[3]}]
    told = (await house.http.post("/v1/route", json={"messages": moved})).json()
    assert [part["id"] for part in told["mix"]] == ["french"]


async def test_only_what_is_routed_is_constrained(house: House) -> None:
    for body in ({"model": "cron"}, {"model": "auto", "experts": [{"id": "cron"}]}):
        assert error(await house.chat("hi", routing={}, **body), 400)["param"] == "routing"


@pytest.mark.parametrize(
    ("routing", "param"),
    [
        ({"allow": []}, "routing.allow"),
        ({"min_confidence": 1.5}, "routing.min_confidence"),
        ({"mode": "best"}, "routing.mode"),
        ({"max_experts": 0}, "routing.max_experts"),
        ({"fast": True}, "routing.fast"),
    ],
)
async def test_faults_are_named(house: House, routing: dict[str, object], param: str) -> None:
    assert error(await house.chat("hi", model="auto", routing=routing), 400)["param"] == param


async def test_an_expert_that_is_allowed_must_exist(house: House) -> None:
    found = error(await house.chat("hi", model="auto", routing={"allow": ["cron", "corn"]}), 404)
    assert found["param"] == "routing.allow"


@pytest.fixture
async def own_house(tmp_path: Path) -> AsyncIterator[House]:
    """A server of its own, whose experts may change."""
    async with open_house(tmp_path) as house:
        for value, (name, exemplars) in enumerate((("cron", CRON), ("french", FRENCH)), start=1):
            path = make_expert(house.folder / name, value=value, name=name, exemplars=tuple(exemplars))
            assert (await house.upload(path)).status_code == 201
        yield house


async def test_an_alias_may_be_denied_and_what_does_not_exist_may_not(own_house: House) -> None:
    assert (await own_house.http.put("/v1/aliases/sched", json={"target": "cron"})).status_code == 201
    answer = await own_house.chat(CRON[0], model="auto", routing={"deny": ["sched"]})
    assert answer.headers["x-switchyard-mix"] == "base"
    found = error(await own_house.chat(CRON[0], model="auto", routing={"deny": ["corn"]}), 404)
    assert found["param"] == "routing.deny"


async def test_what_was_removed_elsewhere_is_not_routed_to(own_house: House) -> None:
    """The router learns of it a moment later, and an open server's caller may see everything."""
    assert (await own_house.chat(CRON[0], model="auto")).headers["x-switchyard-mix"] == "cron=1"
    own_house.registry.remove("cron", force=True)
    answer = await own_house.chat(CRON[0], model="auto")
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-switchyard-mix"] != "cron=1"
