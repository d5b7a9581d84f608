"""`GET /v1/route/map`: the map and the prompts on it, of what exists for the caller."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from tests.api.house import CRON, FRENCH, ROOT, House, error, key_of, make_expert, open_house

pytestmark = pytest.mark.anyio


@pytest.fixture
async def house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    """`cron` is acme's, `french` is everyone's."""
    folder = tmp_path_factory.mktemp("map")
    async with open_house(folder, api_keys="root") as house:
        for value, (name, headers, exemplars) in enumerate(
            (("cron", await key_of(house, "acme"), CRON), ("french", ROOT, FRENCH)), start=1
        ):
            path = make_expert(folder / name, value=value, exemplars=tuple(exemplars))
            files, data = {"file": (name, path.read_bytes())}, {"name": name}
            assert (await house.http.post("/v1/experts", files=files, data=data, headers=headers)).status_code == 201
        yield house


async def ask(house: House, prompt: str, headers: dict[str, str]) -> None:
    body = {"model": "auto", "prompt": prompt, "max_tokens": 1}
    assert (await house.http.post("/v1/completions", json=body, headers=headers)).status_code == 200


async def the_map(house: House, headers: dict[str, str], **query: Any) -> dict[str, Any]:
    answer = await house.http.get("/v1/route/map", params=query, headers=headers)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


async def test_prompts_lie_near_their_expert_with_the_decision(house: House) -> None:
    acme = await key_of(house, "acme")
    for prompt in (CRON[1], FRENCH[2]):
        await ask(house, prompt, acme)
    told = await the_map(house, acme)
    assert [expert["id"] for expert in told["experts"]] == ["cron", "french"]
    middle = {expert["id"]: np.mean(expert["centres"], axis=0) for expert in told["experts"]}
    cron, french = told["recent"]
    for one, name, other in ((cron, "cron", "french"), (french, "french", "cron")):
        place = np.array([one["x"], one["y"]])
        assert np.linalg.norm(place - middle[name]) < np.linalg.norm(place - middle[other])
        assert [part["id"] for part in one["mix"]] == [name]
        assert (one["code"], one["neighbours"][0]["id"]) == ("matched", name)
        assert name in one["reason"]
        assert one["distance"] <= one["threshold"]
    again = (await house.http.post("/v1/route", json={"prompt": CRON[1]}, headers=acme)).json()
    assert {key: cron[key] for key in ("mix", "code", "reason", "neighbours")} == {
        key: again[key] for key in ("mix", "code", "reason", "neighbours")
    }


async def test_it_can_be_followed(house: House) -> None:
    await ask(house, CRON[1], ROOT)
    first = await the_map(house, ROOT)
    await ask(house, FRENCH[1], ROOT)
    new = await the_map(house, ROOT, after=first["recent"][-1]["number"])
    assert [one["mix"][0]["id"] for one in new["recent"]] == ["french"]
    assert new["edition"] == first["edition"]
    assert [expert["centres"] for expert in new["experts"]] == [expert["centres"] for expert in first["experts"]]
    assert (await the_map(house, ROOT, after=new["recent"][-1]["number"]))["recent"] == []
    assert (await house.http.delete("/v1/experts/cron", headers=ROOT)).status_code == 200
    assert (await the_map(house, ROOT))["edition"] != first["edition"]


async def test_each_tenant_sees_its_own(house: House) -> None:
    await ask(house, CRON[1], await key_of(house, "acme"))
    told = await the_map(house, await key_of(house, "globex"))
    assert [expert["id"] for expert in told["experts"]] == ["french"]
    assert told["recent"] == []
    assert "cron" not in str(told)
    few = await the_map(house, ROOT, experts=1)
    assert ([expert["id"] for expert in few["experts"]], few["left_out"]) == (["cron"], 1)


async def test_faults_are_named(house: House) -> None:
    for param, wrong in (("experts", 0), ("experts", 65), ("after", -1)):
        answer = await house.http.get("/v1/route/map", params={param: wrong}, headers=ROOT)
        assert error(answer, 400)["param"] == param
    assert error(await house.http.get("/v1/route/map"), 401)


async def test_prompts_that_an_administrator_routed_are_not_told_to_its_tenant(house: House) -> None:
    """Experts were looked for that the tenant must not know of."""
    made = await house.http.post("/v1/admin/keys", json={"tenant": "globex", "roles": ["admin"]}, headers=ROOT)
    admin = {"authorization": f"Bearer {made.json()['key']}"}
    await ask(house, CRON[1], admin)
    assert (await the_map(house, await key_of(house, "globex")))["recent"] == []
    assert [one["mix"][0]["id"] for one in (await the_map(house, admin))["recent"]] == ["cron"]


async def test_an_expert_that_is_private_now_is_not_told_of(house: House) -> None:
    globex = await key_of(house, "globex")
    for visibility, known in (("public", ["cron"]), ("private", [])):
        changed = await house.http.put("/v1/experts/cron/access", json={"visibility": visibility}, headers=ROOT)
        assert changed.status_code == 200
        if visibility == "public":
            await ask(house, CRON[1], globex)
        recent = (await the_map(house, globex))["recent"]
        assert [part["id"] for one in recent for part in one["mix"]] == known
        assert all(near["id"] != "cron" for one in recent for near in one["neighbours"]) or known
