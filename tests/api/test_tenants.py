"""Tenants: what a tenant may not see does not exist for it, on any route, by any name, and in no message."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from store.access import Access, Visibility
from tests.api.house import CRON, FRENCH, ROOT, House, error, key_of, make_expert, open_house

pytestmark = pytest.mark.anyio

RECIPES = [f"how long do I bake a cake of {n} eggs" for n in range(1, 13)]


async def publish(
    house: House, headers: dict[str, str], name: str, value: int, exemplars: list[str], **form: str
) -> Any:
    path = make_expert(house.folder / f"{name}-{value}", value=value, exemplars=tuple(exemplars))
    files = {"file": (path.name, path.read_bytes())}
    return await house.http.post("/v1/experts", files=files, data={"name": name, **form}, headers=headers)


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    """`cron` is acme's, `french` is globex's, `cake` is everyone's."""
    async with open_house(tmp_path, api_keys="root") as house:
        for who, name, value, texts in (("acme", "cron", 1, CRON), ("globex", "french", 2, FRENCH)):
            assert (await publish(house, await key_of(house, who), name, value, texts)).status_code == 201
        assert (await publish(house, ROOT, "cake", 3, RECIPES)).status_code == 201
        yield house


@pytest.fixture
async def acme(house: House) -> dict[str, str]:
    return await key_of(house, "acme")


@pytest.fixture
async def globex(house: House) -> dict[str, str]:
    return await key_of(house, "globex")


async def test_new_experts_are_their_tenants_and_the_operators_are_everyones(
    house: House, acme: dict[str, str]
) -> None:
    assert house.registry.get("cron").access == Access("acme", Visibility.PRIVATE)
    assert house.registry.get("cake").access == Access()
    shown = (await house.http.get("/v1/experts/cron", headers=acme)).json()
    assert (shown["owner"], shown["visibility"], shown["shared_with"]) == ("acme", "private", [])


async def test_lists_show_what_exists_for_the_caller(
    house: House, acme: dict[str, str], globex: dict[str, str]
) -> None:
    for headers, names in ((acme, ["cake", "cron"]), (globex, ["cake", "french"]), (ROOT, ["cake", "cron", "french"])):
        listed = (await house.http.get("/v1/experts", headers=headers)).json()["data"]
        assert [expert["id"] for expert in listed] == names
        models = (await house.http.get("/v1/models", headers=headers)).json()["data"]
        assert [model["id"] for model in models] == ["dummy-base", "auto", *names]
        page = (await house.http.get("/v1/experts", params={"limit": 1}, headers=headers)).json()
        assert page["has_more"]
        found = (await house.http.get("/v1/experts", params={"q": "french"}, headers=headers)).json()["data"]
        assert bool(found) == ("french" in names)


async def test_what_is_hidden_is_answered_like_what_is_not_there(house: House, acme: dict[str, str]) -> None:
    def asked(name: str) -> list[tuple[str, str, dict[str, Any]]]:
        turn = [{"role": "user", "content": "x"}]
        return [
            ("GET", f"/v1/models/{name}", {}),
            ("GET", f"/v1/experts/{name}", {}),
            ("GET", f"/v1/experts/{name}/versions", {}),
            ("DELETE", f"/v1/experts/{name}", {}),
            ("PATCH", f"/v1/experts/{name}", {"description": "mine"}),
            ("PUT", f"/v1/experts/{name}/access", {"visibility": "private"}),
            ("POST", f"/v1/experts/{name}/rollback", {}),
            ("POST", "/v1/chat/completions", {"model": name, "messages": turn}),
            ("POST", "/v1/completions", {"model": name, "prompt": "x"}),
            ("POST", "/v1/embeddings", {"model": name, "input": "x"}),
            ("POST", "/v1/chat/completions", {"model": "auto", "messages": turn, "experts": [{"id": name}]}),
        ]

    # "frenck" is as near to "french" as a name can be: nothing may suggest it.
    for hidden, absent in zip(asked("french"), asked("frenck"), strict=True):
        answers = []
        for method, path, body in (hidden, absent):
            answer = await house.http.request(method, path, json=body if method != "GET" else None, headers=acme)
            detail = error(answer, 404)
            answers.append({**detail, "message": detail["message"].replace("french", "NAME").replace("frenck", "NAME")})
        assert answers[0] == answers[1], hidden
    assert house.registry.get("french").access.owner == "globex"


async def test_a_name_that_is_taken_is_taken_without_saying_whose(house: House, acme: dict[str, str]) -> None:
    digest = house.registry.get("french").digest
    for value in (2, 7):  # the very same file, and another
        detail = error(await publish(house, acme, "french", value, FRENCH), 409)
        assert detail["code"] == "name_taken"
        assert digest[:12] not in detail["message"]
        assert "globex" not in detail["message"]
    path = make_expert(house.folder / "new", value=9)
    put = await house.http.put("/v1/experts/french", files={"file": ("f", path.read_bytes())}, headers=acme)
    assert error(put, 409)["code"] == "name_taken"
    assert house.registry.get("french").digest == digest


async def test_what_is_everyones_is_changed_by_administrators_only(house: House, acme: dict[str, str]) -> None:
    path = make_expert(house.folder / "new", value=9)
    files = {"file": ("f", path.read_bytes())}
    for answer in (
        await house.http.put("/v1/experts/cake", files=files, headers=acme),
        await house.http.delete("/v1/experts/cake", headers=acme),
        await house.http.patch("/v1/experts/cake", json={"description": "mine"}, headers=acme),
        await house.http.put("/v1/experts/cake/access", json={"visibility": "private"}, headers=acme),
    ):
        assert answer.status_code in (400, 403), answer.text
    assert error(await house.http.delete("/v1/experts/cake", headers=acme), 403)["code"] == "not_permitted"
    assert (await house.http.delete("/v1/experts/cake", headers=ROOT)).status_code == 200


async def test_a_replacement_and_a_rollback_keep_whose_it_is(house: House, acme: dict[str, str]) -> None:
    path = make_expert(house.folder / "new", value=9, exemplars=tuple(CRON))
    files = {"file": ("f", path.read_bytes())}
    assert (await house.http.put("/v1/experts/cron", files=files, headers=ROOT)).status_code == 200
    assert house.registry.get("cron").access == Access("acme", Visibility.PRIVATE)
    assert (await house.http.post("/v1/experts/cron/rollback", json={}, headers=acme)).status_code == 200
    assert house.registry.get("cron").access == Access("acme", Visibility.PRIVATE)
    assert house.registry.get("cron").earlier[0].access == Access()


async def route(house: House, headers: dict[str, str], prompt: str) -> dict[str, Any]:
    answer = await house.http.post("/v1/route", json={"prompt": prompt}, headers=headers)
    decision: dict[str, Any] = answer.json()
    return decision


async def test_routing_finds_what_exists_for_the_caller_and_shows_nothing_else(
    house: House, acme: dict[str, str], globex: dict[str, str]
) -> None:
    for headers, own, foreign in ((acme, CRON, "french"), (globex, FRENCH, "cron")):
        for prompt in (CRON[3], FRENCH[3], RECIPES[3]):
            decision = await route(house, headers, prompt)
            text = str(decision)
            assert foreign not in str([n["id"] for n in decision["neighbours"]])
            texts = {n["exemplar"] for n in decision["neighbours"] if n["id"] is not None}
            assert not texts & set(FRENCH if foreign == "french" else CRON), text
            assert bool(decision["mix"]) == (prompt in own or prompt in RECIPES), text
    answer = await house.http.post(
        "/v1/chat/completions",
        json={"model": "auto", "messages": [{"role": "user", "content": FRENCH[3]}]},
        headers=acme,
    )
    assert answer.headers["x-switchyard-mix"] == "base"
    shared = await house.http.post(
        "/v1/chat/completions",
        json={"model": "auto", "messages": [{"role": "user", "content": RECIPES[3]}]},
        headers=acme,
    )
    assert shared.headers["x-switchyard-mix"] == "cake=1"


async def test_the_same_file_of_two_tenants_is_found_by_both_under_their_own_names(
    house: House, acme: dict[str, str], globex: dict[str, str]
) -> None:
    # The index keeps one entry for both: the first in the alphabet, which is the other tenant's.
    assert (await publish(house, globex, "a-secret-name", 1, CRON)).status_code == 201
    for headers, name in ((acme, "cron"), (globex, "a-secret-name")):
        decision = await route(house, headers, CRON[3])
        assert [part["id"] for part in decision["mix"]] == [name]
        assert {n["id"] for n in decision["neighbours"]} <= {name, "cake", "french", None}
        assert name in decision["reason"]


async def test_a_tenant_without_experts_is_told_of_none(house: House) -> None:
    assert (await house.http.delete("/v1/experts/cake", headers=ROOT)).status_code == 200
    decision = await route(house, await key_of(house, "newcomer"), CRON[3])
    assert (decision["code"], decision["neighbours"], decision["distance"]) == ("no_experts", [], None)
    assert "allow" not in decision["reason"]


async def test_sharing_takes_an_administrator_and_counts_at_once(
    house: House, acme: dict[str, str], globex: dict[str, str]
) -> None:
    async def put(headers: dict[str, str], **body: Any) -> Any:
        return await house.http.put("/v1/experts/cron/access", json=body, headers=headers)

    for body in ({"visibility": "public"}, {"visibility": "shared", "shared_with": ["globex"]}):
        assert error(await put(acme, **body), 403)["param"] == "visibility"
    assert error(await put(acme, visibility="private", owner="globex"), 403)["code"] == "not_permitted"
    assert (await put(ROOT, visibility="shared", shared_with=["globex", "globex", "x"])).status_code == 200
    assert [part["id"] for part in (await route(house, globex, CRON[3]))["mix"]] == ["cron"]
    seen = (await house.http.get("/v1/experts/cron", headers=globex)).json()
    assert (seen["visibility"], seen["owner"], seen["shared_with"]) == ("shared", None, [])
    assert error(await house.http.delete("/v1/experts/cron", headers=globex), 403)["code"] == "not_permitted"
    assert error(await put(acme, visibility="shared", shared_with=["other"]), 403)
    narrowed = await put(acme, visibility="shared", shared_with=["x"])
    assert narrowed.json()["shared_with"] == ["x"]
    assert not (await route(house, globex, CRON[3]))["mix"]
    assert (await put(ROOT, visibility="public")).status_code == 200
    assert [part["id"] for part in (await route(house, globex, CRON[3]))["mix"]] == ["cron"]
    assert (await put(acme, visibility="private")).status_code == 200
    error(await house.http.get("/v1/experts/cron", headers=globex), 404)
    assert (await put(ROOT, visibility="private", owner="globex")).json()["owner"] == "globex"
    error(await house.http.get("/v1/experts/cron", headers=acme), 404)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "visibility"),
        ({"visibility": "secret"}, "visibility"),
        ({"visibility": "shared"}, "shared_with"),
        ({"visibility": "public", "shared_with": ["x"]}, "shared_with"),
        ({"visibility": "shared", "shared_with": ["No Tenant"]}, "shared_with"),
        ({"visibility": "private", "owner": None}, "owner"),
        ({"visibility": "public", "owner": "../x"}, "owner"),
    ],
)
async def test_bad_access_is_named(house: House, body: dict[str, Any], param: str) -> None:
    answer = await house.http.put("/v1/experts/cron/access", json=body, headers=ROOT)
    assert error(answer, 400)["param"] == param


async def test_records_from_before_tenants_are_everyones_and_stay_as_they_are(house: House) -> None:
    file = house.folder / "data/records/cake.json"
    before = file.read_bytes()
    assert b"visibility" not in before
    assert b"owner" not in before
    assert (await house.http.patch("/v1/experts/cake", json={"description": "x"}, headers=ROOT)).status_code == 200
    assert (await house.http.patch("/v1/experts/cake", json={"description": ""}, headers=ROOT)).status_code == 200
    assert file.read_bytes() == before
    assert b'"owner": "acme"' in (house.folder / "data/records/cron.json").read_bytes()


async def test_aliases_are_their_experts_owners(house: House, acme: dict[str, str], globex: dict[str, str]) -> None:
    async def put(headers: dict[str, str], alias: str, target: str) -> Any:
        return await house.http.put(f"/v1/aliases/{alias}", json={"target": target}, headers=headers)

    assert (await put(acme, "crontab", "cron")).status_code == 201
    assert error(await put(globex, "mine", "cron"), 404)["param"] == "target"
    assert error(await put(globex, "mine", "cake"), 403)["code"] == "not_permitted"
    for taken in ("crontab", "cron"):  # an alias and an expert of others are one like the other
        detail = error(await put(globex, taken, "french"), 409)
        assert detail["message"] == f"the name {taken} is taken; choose another"
        assert error(await publish(house, globex, taken, 9, FRENCH), 409)["code"] == "name_taken"
    for method, path in (
        ("GET", "/v1/aliases/crontab"),
        ("DELETE", "/v1/aliases/crontab"),
        ("GET", "/v1/models/crontab"),
        ("GET", "/v1/experts/crontab"),
        ("DELETE", "/v1/experts/crontab"),
    ):
        detail = error(await house.http.request(method, path, headers=globex), 404)
        assert "cron'" not in detail["message"]
    lists = [(await house.http.get("/v1/aliases", headers=headers)).json()["data"] for headers in (acme, globex, ROOT)]
    assert [[alias["id"] for alias in one] for one in lists] == [["crontab"], [], ["crontab"]]
    models = (await house.http.get("/v1/models", headers=globex)).json()["data"]
    assert "crontab" not in [model["id"] for model in models]
    answer = await house.http.post("/v1/completions", json={"model": "crontab", "prompt": "x"}, headers=acme)
    assert answer.headers["x-switchyard-mix"] == "cron=1"
    assert (await house.http.delete("/v1/aliases/crontab", headers=acme)).status_code == 200
