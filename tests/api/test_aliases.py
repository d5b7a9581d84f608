"""Aliases over HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.api.house import BASE, CRON, House, error, make_expert, open_house

pytestmark = pytest.mark.anyio


@pytest.fixture
async def own(tmp_path: Path) -> AsyncIterator[House]:
    async with open_house(tmp_path) as house:
        await house.upload(make_expert(tmp_path / "e", value=1, name="cron-v1", exemplars=tuple(CRON)))
        yield house


async def test_an_alias_is_a_model(own: House) -> None:
    made = await own.http.put("/v1/aliases/cron", json={"target": "cron-v1"})
    assert made.status_code == 201
    alias = made.json()
    assert alias == {"id": "cron", "object": "alias", "created": alias["created"], "target": "cron-v1"}
    assert (await own.http.put("/v1/aliases/cron", json={"target": "cron-v1"})).status_code == 200
    assert (await own.http.get("/v1/aliases/cron")).json() == alias
    assert (await own.http.get("/v1/aliases")).json() == {"object": "list", "data": [alias]}

    answer = await own.chat(model="cron")
    assert answer.headers["x-switchyard-mix"] == "cron-v1=1"
    assert answer.json()["model"] == "cron"
    mixed = await own.chat(experts=[{"id": "cron", "weight": 0.5}])
    assert mixed.headers["x-switchyard-mix"] == "cron-v1=0.5"
    routed = (await own.http.post("/v1/route", json={"prompt": CRON[2]})).json()
    assert [part["id"] for part in routed["mix"]] == ["cron-v1"]

    record = own.registry.get("cron-v1")
    listed = (await own.http.get("/v1/models")).json()["data"]
    assert [model["id"] for model in listed] == [BASE, "auto", "cron-v1", "cron"]
    assert listed[3]["alias_of"] == "cron-v1"
    assert listed[3]["root"] == record.digest
    assert (await own.http.get("/v1/models/cron")).json() == listed[3]
    experts = (await own.http.get("/v1/experts")).json()["data"]
    assert [(expert["id"], expert["aliases"]) for expert in experts] == [("cron-v1", ["cron"])]
    assert (await own.http.get("/v1/experts/cron")).json()["id"] == "cron-v1"

    new = make_expert(own.folder / "new", value=2)
    await own.http.put("/v1/experts/cron-v1", files={"file": ("e", new.read_bytes())})
    [(digest, _)] = own.engine.streams[-1].request.mix.parts
    assert (await own.chat(model="cron")).status_code == 200
    assert own.engine.streams[-1].request.mix.parts[0][0] != digest, "it follows a replacement"
    gone = await own.http.delete("/v1/aliases/cron")
    assert gone.json() == {"id": "cron", "object": "alias", "deleted": True}
    assert error(await own.chat(model="cron"), 404)["code"] == "model_not_found"


async def test_what_is_refused(own: House) -> None:
    await own.http.put("/v1/aliases/cron", json={"target": "cron-v1"})
    for alias, target, status, param in (
        ("cron-v1", "cron-v1", 409, "alias"),
        ("x", "cron", 400, "target"),
        ("x", "none", 404, "target"),
        ("auto", "cron-v1", 400, "name"),
        (BASE, "cron-v1", 400, "name"),
    ):
        refused = await own.http.put(f"/v1/aliases/{alias}", json={"target": target})
        assert error(refused, status)["param"] == param
    assert error(await own.http.put("/v1/aliases/x", json={}), 400)["param"] == "target"
    assert error(await own.http.delete("/v1/aliases/x"), 404)["code"] == "alias_not_found"
    assert error(await own.http.get("/v1/aliases/x"), 404)["code"] == "alias_not_found"
    path = own.folder / "e"
    assert error(await own.upload(path, name="cron"), 409)["code"] == "is_alias"
    assert error(await own.http.put("/v1/experts/cron", files={"file": ("e", path.read_bytes())}), 409)
    assert error(await own.http.delete("/v1/experts/cron"), 409)["code"] == "is_alias"

    detail = error(await own.http.delete("/v1/experts/cron-v1"), 409)
    assert (detail["code"], detail["param"]) == ("has_aliases", "name")
    assert (await own.chat(model="cron")).status_code == 200
    assert (await own.http.delete("/v1/experts/cron-v1", params={"force": True})).status_code == 200
    assert (await own.http.get("/v1/aliases")).json()["data"] == []
    assert error(await own.chat(model="cron"), 404)
