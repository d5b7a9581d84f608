"""`/v1/experts/{name}/exemplars`: experts are found by other prompts than they came with."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from store.errors import StoreError
from tests.api.house import CRON, FRENCH, House, error, make_expert, open_house

pytestmark = pytest.mark.anyio

RECIPES = [f"how long do I bake a cake of {n} eggs" for n in range(1, 13)]
ROOT = {"authorization": "Bearer root"}


@pytest.fixture(scope="module")
async def module_house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    async with open_house(tmp_path_factory.mktemp("exemplars"), api_keys="root", max_body_bytes=100_000) as house:
        house.http.headers.update(ROOT)
        yield house


@pytest.fixture
async def own(module_house: House) -> AsyncIterator[House]:
    """`cron` has exemplars in its file, `bare` has none."""
    module_house.engine.reset()
    folder = module_house.folder
    await module_house.upload(make_expert(folder / "cron", value=1, name="cron", exemplars=tuple(CRON)))
    await module_house.upload(make_expert(folder / "bare", value=2, name="bare"))
    yield module_house
    for record in module_house.registry.list():
        await module_house.http.delete(f"/v1/experts/{record.name}?force=true")


async def put(house: House, name: str, prompts: Any, headers: dict[str, str] | None = None) -> httpx.Response:
    return await house.http.put(f"/v1/experts/{name}/exemplars", json={"exemplars": prompts}, headers=headers)


async def mix_of(house: House, prompt: str) -> str:
    return (await house.chat(prompt, model="auto")).headers["x-switchyard-mix"]


async def test_an_expert_without_exemplars_says_so_and_gets_some(own: House) -> None:
    told = (await own.http.get("/v1/experts/bare")).json()
    assert (told["routing"], told["routed"], told["exemplar_count"]) == ("none", False, 0)
    assert "PUT /v1/experts/bare/exemplars" in told["routing_reason"]
    assert await mix_of(own, FRENCH[3]) == "base"
    changed = await put(own, "bare", [*FRENCH, FRENCH[0]])
    assert changed.status_code == 200
    assert (changed.json()["exemplar_count"], changed.json()["routing"]) == (len(FRENCH), "ready")
    assert changed.json()["digest"] == told["digest"], "the file is what it was"
    assert await mix_of(own, FRENCH[3]) == "bare=1"
    told = (await own.http.get("/v1/experts/bare")).json()
    assert (told["routed"], told["exemplar_count"]) == (True, len(FRENCH))
    assert "like its exemplars" in told["routing_reason"]


async def test_they_are_replaced_shown_and_given_back(own: House) -> None:
    async def shown() -> tuple[bool, list[str]]:
        answer = (await own.http.get("/v1/experts/cron/exemplars")).json()
        return answer["from_file"], answer["exemplars"]

    assert await shown() == (True, CRON)
    assert (await put(own, "cron", RECIPES)).status_code == 200
    assert await shown() == (False, RECIPES)
    assert (await mix_of(own, RECIPES[2]), await mix_of(own, CRON[2])) == ("cron=1", "base")
    back = await own.http.delete("/v1/experts/cron/exemplars")
    assert (back.status_code, back.json()["exemplar_count"]) == (200, len(CRON))
    assert await shown() == (True, CRON)
    assert (await mix_of(own, RECIPES[2]), await mix_of(own, CRON[2])) == ("base", "cron=1")
    await put(own, "bare", FRENCH)
    assert (await own.http.delete("/v1/experts/bare/exemplars")).json()["routing"] == "none"
    assert await mix_of(own, FRENCH[3]) == "base"


async def test_what_another_server_changes_is_learned_too(own: House) -> None:
    """The registry is all that servers share."""
    own.registry.set_exemplars("bare", lambda _: FRENCH)
    while (await own.http.get("/v1/experts/bare")).json()["routing"] != "ready":
        await asyncio.sleep(0.01)
    assert await mix_of(own, FRENCH[3]) == "bare=1"


async def test_what_cannot_be_learned_now_stands_and_is_learned_later(
    own: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.library._RETRY_SECONDS", 0.0)
    own.engine.features_failure = StoreError("no features today")
    answer = await put(own, "bare", [f"water the plants of room {n}" for n in range(9)])
    assert (answer.status_code, answer.json()["routing"]) == (200, "pending")
    told = (await own.http.get("/v1/experts/bare")).json()
    assert (told["routed"], "does not know its exemplars yet" in told["routing_reason"]) == (False, True)
    own.engine.features_failure = None
    while (await own.http.get("/v1/experts/bare")).json()["routing"] != "ready":
        await asyncio.sleep(0.01)
    assert await mix_of(own, "water the plants of room 3") == "bare=1"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "exemplars"),
        ({"exemplars": []}, "exemplars"),
        ({"exemplars": "one"}, "exemplars"),
        ({"exemplars": ["one", 2]}, "exemplars[1]"),
        ({"exemplars": ["one", "\ud800"]}, "exemplars[1]"),
        ({"exemplars": ["one", " "]}, "exemplars"),
        ({"exemplars": ["one"], "name": "x"}, "name"),
    ],
)
async def test_faults_are_named_and_change_nothing(own: House, body: dict[str, Any], param: str) -> None:
    before = own.registry.list()
    content = json.dumps(body)
    headers = {"content-type": "application/json"}
    answer = await own.http.put("/v1/experts/cron/exemplars", content=content, headers=headers)
    assert error(answer, 400)["param"] == param
    assert own.registry.list() == before


async def test_they_are_bounded(own: House) -> None:
    assert error(await put(own, "cron", ["x" * 200_000]), 413)["message"].endswith("100000 bytes")
    assert error(await put(own, "cron", [f"{n}" for n in range(5000)]), 400)["param"] == "exemplars"


async def test_who_may_change_and_see_them(own: House) -> None:
    async def key(tenant: str, *roles: str) -> dict[str, str]:
        made = await own.http.post("/v1/admin/keys", json={"tenant": tenant, "roles": roles})
        return {"authorization": f"Bearer {made.json()['key']}"}

    acme, reader = await key("acme", "infer", "upload"), await key("acme", "infer")
    file = make_expert(own.folder / "mine", value=3).read_bytes()
    await own.http.post("/v1/experts", files={"file": ("e", file)}, data={"name": "mine"}, headers=acme)
    assert (await put(own, "mine", RECIPES, acme)).status_code == 200
    assert (await own.http.get("/v1/experts/mine/exemplars", headers=acme)).json()["exemplars"] == RECIPES
    for refused in (
        await put(own, "cron", RECIPES, acme),
        await own.http.delete("/v1/experts/cron/exemplars", headers=acme),
        await own.http.get("/v1/experts/cron/exemplars", headers=acme),
        await put(own, "mine", FRENCH, reader),
    ):
        error(refused, 403)
    globex = await key("globex", "infer", "upload")
    for hidden in (await put(own, "mine", FRENCH, globex), await put(own, "none", FRENCH, globex)):
        assert error(hidden, 404)["param"] == "name"
    entries = (await own.http.get("/v1/admin/audit", params={"action": "expert.exemplars"})).json()["data"]
    done = next(entry for entry in entries if entry.get("target") == "mine" and entry["outcome"] == "done")
    assert (done["tenant"], done["details"]["count"]) == ("acme", str(len(RECIPES)))
    assert any(entry["outcome"] == "refused" for entry in entries)
    assert RECIPES[0] not in (own.settings.data_dir / "audit.jsonl").read_text(), "the log tells no prompts"


async def test_an_alias_is_not_the_place(own: House) -> None:
    await own.http.put("/v1/aliases/also", json={"target": "cron"})
    assert error(await put(own, "also", FRENCH), 409)["code"] == "is_alias"
    assert (await own.http.get("/v1/experts/also/exemplars")).json()["id"] == "cron"


async def test_they_survive_a_restart(tmp_path: Path) -> None:
    async with open_house(tmp_path) as house:
        house.publish("bare", value=2)
        await put(house, "bare", FRENCH)
    async with open_house(tmp_path) as house:
        assert await mix_of(house, FRENCH[3]) == "bare=1"


async def test_two_servers_of_one_store_learn_from_each_other(tmp_path: Path) -> None:
    async with open_house(tmp_path) as one, open_house(tmp_path) as other:
        one.publish("bare", value=2)
        assert (await put(one, "bare", FRENCH)).status_code == 200
        while (await other.http.get("/v1/experts/bare")).json().get("routing") != "ready":
            await asyncio.sleep(0.01)
        assert await mix_of(other, FRENCH[3]) == "bare=1"
        assert (await other.http.delete("/v1/experts/bare/exemplars")).json()["routing"] == "none"
        while await mix_of(one, FRENCH[3]) != "base":
            await asyncio.sleep(0.01)
