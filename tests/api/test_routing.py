"""What a client may ask of the routing of `model: auto`."""

from __future__ import annotations

import pytest

from tests.api.house import CRON, FRENCH, House, error

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
