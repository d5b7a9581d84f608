"""Experts come, are used at once, and go."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from store.card import Card
from store.errors import StoreError
from tests.api.house import BASE, CRON, FRENCH, House, error, make_expert, open_house

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
async def module_house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    async with open_house(tmp_path_factory.mktemp("experts")) as house:
        yield house


@pytest.fixture
async def own(module_house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[House]:
    """A server without experts; checks that nothing is left over in quarantine, nor among temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    module_house.engine.reset()
    yield module_house
    assert module_house.quarantined == []
    assert list(tmp_path.iterdir()) == []
    for record in module_house.registry.list():
        await module_house.http.delete(f"/v1/experts/{record.name}")


def lines(prompts: list[str]) -> str:
    return "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)


async def test_upload(own: House) -> None:
    card = Card("ada", "MIT", ("time",), ("a" * 64,), {"k": "v"})
    path = make_expert(own.folder / "e", name="cron", description="for crontabs", exemplars=tuple(CRON), card=card)
    response = await own.upload(path)
    assert response.status_code == 201
    record = own.registry.get("cron")
    assert response.json() == {
        "id": "cron",
        "object": "expert",
        "created": record.created,
        "parent": BASE,
        "digest": record.digest,
        "bytes": path.stat().st_size,
        "base_fingerprint": record.base_fingerprint,
        "codec": "raw",
        "density": 0.0,
        "bits_per_param": record.bits_per_param,
        "description": "for crontabs",
        "author": "ada",
        "license": "MIT",
        "tags": ["time"],
        "parents": ["a" * 64],
        "relative_to": None,
        "exact": False,
        "report": None,
        "metadata": {"k": "v"},
        "signed_by": None,
        "aliases": [],
        "exemplar_count": len(CRON),
        "visibility": "public",
        "owner": None,
        "shared_with": [],
        "routing": "ready",
        "tier": "store",
        "last_used": None,
    }


async def test_where_an_expert_is_and_when_it_was_used_last(own: House) -> None:
    path = make_expert(own.folder / "e", name="cron", exemplars=tuple(CRON))
    digest = (await own.upload(path)).json()["digest"]
    own.engine.resident = frozenset({digest})
    for told in (
        (await own.http.get("/v1/experts")).json()["data"][0],
        (await own.http.get("/v1/experts/cron")).json(),
    ):
        assert (told["tier"], told["last_used"]) == ("device", None)
    before = int(time.time())
    await own.chat(CRON[2], model="auto")
    assert before <= (await own.http.get("/v1/experts/cron")).json()["last_used"] <= time.time()


async def test_live_at_once(own: House) -> None:
    assert (await own.chat(CRON[2], model="auto")).headers["x-switchyard-mix"] == "base"
    await own.upload(make_expert(own.folder / "e", name="cron", exemplars=tuple(CRON)))
    assert (await own.chat(model="cron")).headers["x-switchyard-mix"] == "cron=1"
    assert (await own.chat(CRON[2], model="auto")).headers["x-switchyard-mix"].startswith("cron=")


async def test_the_same_again_changes_nothing(own: House) -> None:
    path = make_expert(own.folder / "e", name="cron")
    first, second = await own.upload(path), await own.upload(path)
    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json() == second.json()
    assert len((await own.http.get("/v1/experts")).json()["data"]) == 1


async def test_two_names_for_one_file(own: House) -> None:
    path = make_expert(own.folder / "e")
    assert (await own.upload(path, name="a")).json()["id"] == "a"
    assert (await own.upload(path, name="b")).status_code == 201
    response = await own.chat(experts=[{"id": "a", "weight": 1}, {"id": "b", "weight": 0.5}])
    assert response.headers["x-switchyard-mix"] == "a=1,b=0.5"
    [(digest, weight)] = own.engine.streams[-1].request.mix.parts
    assert weight == 1.5
    await own.http.delete("/v1/experts/a")
    assert own.engine.dropped == []
    await own.http.delete("/v1/experts/b")
    assert own.engine.dropped == [digest]


async def test_a_name_belongs_to_one_expert(own: House) -> None:
    await own.upload(make_expert(own.folder / "one", value=1, name="cron"))
    detail = error(await own.upload(make_expert(own.folder / "two", value=2, name="cron")), 409)
    assert (detail["code"], detail["param"]) == ("name_taken", "name")


@pytest.mark.parametrize("as_file", [False, True])
async def test_exemplars_beside_the_file(own: House, as_file: bool) -> None:
    files: dict[str, Any] = {"file": ("e", make_expert(own.folder / "e", exemplars=tuple(FRENCH)).read_bytes())}
    data = {"name": "cron"}
    if as_file:
        files["exemplars"] = ("exemplars.jsonl", lines(CRON).encode())
    else:
        data["exemplars"] = lines(CRON)
    response = await own.http.post("/v1/experts", files=files, data=data)
    assert response.status_code == 201, response.text
    assert response.json()["exemplar_count"] == len(CRON)
    assert (await own.chat(CRON[2], model="auto")).headers["x-switchyard-mix"].startswith("cron=")


@pytest.mark.parametrize("name", ["auto", BASE, "Upper", "a/b", "..", "x" * 65])
async def test_names_that_cannot_be(own: House, name: str) -> None:
    detail = error(await own.upload(make_expert(own.folder / "e"), name=name), 400)
    assert detail["param"] == "name"


async def test_files_that_cannot_be(own: House) -> None:
    sound = make_expert(own.folder / "e", name="cron").read_bytes()
    for bad in (b"", b"not an expert", sound[:-1], sound[:40], sound + b"x"):
        response = await own.http.post("/v1/experts", files={"file": ("e", bad)})
        assert error(response, 400)["code"] == "invalid_expert_file"
    assert (await own.http.get("/v1/experts")).json()["data"] == []


@pytest.mark.parametrize(
    ("files", "data", "param", "code"),
    [
        ({}, {"name": "x"}, "file", "missing_required_parameter"),
        ({}, {"file": "text"}, "file", "missing_required_parameter"),
        ({"file": ("f", b"x"), "extra": ("g", b"y")}, {}, "extra", "unknown_parameter"),
        ({"file": ("f", b"x")}, {"size": "1"}, "size", "unknown_parameter"),
        ({"file": ("f", b"x"), "name": ("g", b"y")}, {}, "name", "invalid_request"),
        ({"file": ("f", b"x")}, {"name": ["a", "b"]}, "name", "invalid_request"),
        ({"file": ("f", b"x")}, {"exemplars": "{"}, "exemplars", "invalid_request"),
    ],
)
async def test_forms_that_cannot_be(own: House, files: Any, data: Any, param: str | None, code: str) -> None:
    files = files or {"exemplars": (None, lines(CRON))}  # makes httpx send multipart
    detail = error(await own.http.post("/v1/experts", files=files, data=data), 400)
    assert (detail["param"], detail["code"]) == (param, code)


async def test_not_even_a_form(own: House) -> None:
    assert error(await own.http.post("/v1/experts", content=b"x" * 10), 400)["param"] == "file"
    headers = {"content-type": "multipart/form-data; boundary=b"}
    assert error(await own.http.post("/v1/experts", content=b"junk", headers=headers), 400)
    headers = {"content-type": "multipart/form-data"}
    assert error(await own.http.post("/v1/experts", content=b"junk", headers=headers), 400)


async def test_too_many_exemplars(own: House) -> None:
    files = {"file": ("e", make_expert(own.folder / "e").read_bytes()), "exemplars": ("x", b"\n" * (2 << 20))}
    assert error(await own.http.post("/v1/experts", files=files), 413)["param"] == "exemplars"


async def test_large_uploads_are_spooled_and_cleared(own: House) -> None:
    response = await own.http.post("/v1/experts", files={"file": ("e", b"x" * (3 << 20))})
    assert error(response, 400)["code"] == "invalid_expert_file"


async def test_unpublished_if_the_router_cannot_learn_it(own: House) -> None:
    own.engine.features_failure = StoreError("no features today")
    path = make_expert(own.folder / "e", value=77, name="cron", exemplars=tuple(CRON))  # no features cached yet
    response = await own.upload(path)
    assert error(response, 503)["message"] == "no features today"
    assert own.registry.list() == []
    own.engine.features_failure = None
    assert (await own.upload(path)).status_code == 201


async def test_live_by_name_before_the_router_has_learned_it(tmp_path: Path) -> None:
    async with open_house(tmp_path, routing_wait=0.0) as house:
        house.engine.featurize.clear()
        answer = await house.upload(make_expert(tmp_path / "e", name="cron", exemplars=tuple(CRON)))
        assert (answer.status_code, answer.json()["routing"]) == (201, "pending")
        assert (await house.chat(model="cron")).headers["x-switchyard-mix"] == "cron=1"
        replaced = await put(house, "cron", make_expert(tmp_path / "f", value=2, exemplars=tuple(FRENCH)))
        assert (replaced.status_code, replaced.json()["routing"]) == (200, "pending")
        gone = await house.upload(make_expert(tmp_path / "g", value=3, name="gone", exemplars=tuple(CRON)))
        assert gone.status_code == 201
        assert (await house.http.delete("/v1/experts/gone")).status_code == 200
        house.engine.featurize.set()
        while (await house.http.get("/v1/experts/cron")).json()["routing"] != "ready":
            await asyncio.sleep(0.001)
        assert (await house.chat(FRENCH[2], model="auto")).headers["x-switchyard-mix"] == "cron=1"
        assert (await house.chat(CRON[2], model="auto")).headers["x-switchyard-mix"] == "base"
        for task in list(house.app.state.services.library._teaching._behind.values()):
            await task
        routed = (await house.http.post("/v1/route", json={"prompt": CRON[2]})).json()["mix"]
        assert routed == [], "what was deleted meanwhile is not learned"


async def test_what_could_not_be_learned_behind_the_upload_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.library._RETRY_SECONDS", 0.0)
    async with open_house(tmp_path, routing_wait=0.0) as house:
        house.engine.features_failure = StoreError("no features today")
        answer = await house.upload(make_expert(tmp_path / "e", name="cron", exemplars=tuple(CRON)))
        assert (answer.status_code, answer.json()["routing"]) == (201, "pending")
        await asyncio.sleep(0.05)
        assert (await house.http.get("/v1/experts/cron")).json()["routing"] == "pending"
        house.engine.features_failure = None
        while (await house.http.get("/v1/experts/cron")).json()["routing"] != "ready":
            await asyncio.sleep(0.01)


async def put(own: House, at: str, path: Path, **fields: Any) -> httpx.Response:
    return await own.http.put(f"/v1/experts/{at}", files={"file": ("e", path.read_bytes())}, data=fields)


async def test_replace_and_roll_back(own: House) -> None:
    old = make_expert(own.folder / "old", value=1, exemplars=tuple(CRON))
    new = make_expert(own.folder / "new", value=2, exemplars=tuple(FRENCH))
    assert (await put(own, "cron", old)).status_code == 201
    first = own.registry.get("cron").digest
    own.engine.delay = 0.01
    running = asyncio.create_task(own.chat("hello", model="cron", max_tokens=20))
    while not own.engine.open:
        await asyncio.sleep(0.001)
    replaced = await put(own, "cron", new)
    assert replaced.status_code == 200
    second = replaced.json()["digest"]
    assert first in (await running).text, "a request keeps the version it came for"
    own.engine.delay = 0.0
    assert second in (await own.chat("hello", model="cron")).text
    assert (await own.chat(FRENCH[2], model="auto")).headers["x-switchyard-mix"] == "cron=1"
    assert (await own.chat(CRON[2], model="auto")).headers["x-switchyard-mix"] == "base"
    assert (await put(own, "cron", new)).status_code == 200
    versions = (await own.http.get("/v1/experts/cron/versions")).json()["data"]
    assert [(version["digest"], version["current"]) for version in versions] == [(second, True), (first, False)]

    back = await own.http.post("/v1/experts/cron/rollback", json={})
    assert back.json()["digest"] == first
    assert (await own.chat(CRON[2], model="auto")).headers["x-switchyard-mix"] == "cron=1"
    body = {"digest": second}
    assert (await own.http.post("/v1/experts/cron/rollback", json=body)).json()["digest"] == second
    detail = error(await own.http.post("/v1/experts/cron/rollback", json={"digest": "f" * 64}), 404)
    assert (detail["code"], detail["param"]) == ("version_not_found", "digest")
    assert error(await own.http.post("/v1/experts/cron/rollback", json={"digest": "x"}), 400)["param"] == "digest"
    assert error(await own.http.post("/v1/experts/none/rollback", json={}), 404)


async def test_a_replacement_that_cannot_be_learned_leaves_the_old_one(own: House) -> None:
    await own.upload(make_expert(own.folder / "old", value=1, name="cron", exemplars=tuple(CRON)))
    before = own.registry.list()
    own.engine.features_failure = StoreError("no features today")
    new = make_expert(own.folder / "new", value=78, exemplars=tuple(FRENCH[:5]))
    assert error(await put(own, "cron", new), 503)["message"] == "no features today"
    own.engine.features_failure = None
    assert own.registry.list() == before
    assert (await own.chat(CRON[2], model="auto")).headers["x-switchyard-mix"] == "cron=1"


async def test_replacements_that_cannot_be(own: House) -> None:
    path = make_expert(own.folder / "e")
    assert error(await put(own, "cron", path, name="other"), 400)["param"] == "name"
    assert error(await put(own, "Upper", path), 400)["param"] == "name"
    assert error(await own.http.put("/v1/experts/cron", files={"file": ("e", b"junk")}), 400)
    assert own.registry.list() == []


@pytest.mark.parametrize("call", ["write", "fsync"])
async def test_a_full_disk_is_a_507_and_changes_nothing(own: House, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    await own.upload(make_expert(own.folder / "old", value=1, name="cron"))
    before = own.registry.list()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    new = make_expert(own.folder / "new", value=2)
    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        assert error(await own.upload(new, name="other"), 507)["code"] == "storage_full"
        assert error(await put(own, "cron", new), 507)["code"] == "storage_full"
    assert own.registry.list() == before
    assert own.quarantined == []
    assert (await put(own, "cron", new)).status_code == 200


async def test_list_and_get(own: House) -> None:
    await own.upload(make_expert(own.folder / "b", value=2, name="b"))
    first = (await own.upload(make_expert(own.folder / "a", value=1, name="a", codec_params={"x": 1}))).json()
    listed = (await own.http.get("/v1/experts")).json()
    assert listed["object"] == "list"
    assert listed["has_more"] is False
    first_page = (await own.http.get("/v1/experts", params={"limit": 1})).json()
    assert ([expert["id"] for expert in first_page["data"]], first_page["has_more"]) == (["a"], True)
    rest = (await own.http.get("/v1/experts", params={"limit": 1, "after": "a"})).json()
    assert ([expert["id"] for expert in rest["data"]], rest["has_more"]) == (["b"], False)
    assert (await own.http.get("/v1/experts", params={"q": "zzz"})).json()["data"] == []
    assert error(await own.http.get("/v1/experts", params={"limit": 0}), 400)["param"] == "limit"
    assert [expert["id"] for expert in listed["data"]] == ["a", "b"]
    assert listed["data"][0] == first
    details = (await own.http.get("/v1/experts/a")).json()
    assert details == first | {
        "codec_params": {"x": 1},
        "tool": "tests",
        "tensors": {"ternary": 0, "dense": 1, "elements": 4, "nonzeros": 4},
        "layers": [
            {
                "layer": "outside",
                "parameters": 4,
                "nonzeros": 4,
                "bytes": 8,
                "density": 1.0,
                "bits_per_param": 16.0,
                "bit_width": 16.0,
            }
        ],
        "routed": False,
        "routing_reason": details["routing_reason"],
    }
    assert error(await own.http.get("/v1/experts/c"), 404)["code"] == "model_not_found"


async def test_describe_and_search(own: House) -> None:
    await own.upload(make_expert(own.folder / "a", value=1, name="a", card=Card(author="Ada", tags=("x", "y"))))
    await own.upload(make_expert(own.folder / "b", value=2, name="b", card=Card(tags=("x",), metadata={"k": "Köln"})))
    await own.upload(make_expert(own.folder / "c", value=3, name="c"))

    async def found(**query: Any) -> list[str]:
        return [expert["id"] for expert in (await own.http.get("/v1/experts", params=query)).json()["data"]]

    assert await found(tag="x") == ["a", "b"]
    assert await found(tag=["x", "y"]) == ["a"]
    assert await found(tag="x", q="köLN") == ["b"]
    assert await found(q="ada") == ["a"]
    assert await found(tag="x", limit=1, after="a") == ["b"]
    assert await found(tag="z") == []

    before = (await own.http.get("/v1/experts/b")).json()
    change = {"description": "new", "tags": ["z"], "metadata": {"k": None, "l": "m"}}
    changed = await own.http.patch("/v1/experts/b", json=change)
    assert changed.status_code == 200
    assert changed.json() == {
        **{key: value for key, value in before.items() if key in changed.json()},
        "description": "new", "tags": ["z"], "metadata": {"l": "m"},
    }  # fmt: skip
    assert await found(tag="z") == ["b"]
    assert (await own.http.patch("/v1/experts/b", json={})).json() == changed.json()
    assert (await own.http.patch("/v1/experts/b", json={"description": ""})).json()["description"] == ""
    assert (await own.upload(own.folder / "b")).json()["tags"] == ["z"], "the same file again changes nothing"
    for body, param in (
        ({"tags": ["No"]}, "tags"),
        ({"metadata": {"k": "x" * 1001}}, "metadata.k"),
        ({"description": "x" * 2001}, "description"),
        ({"digest": "x"}, "digest"),
        ({"tags": "z"}, "tags"),
    ):
        assert error(await own.http.patch("/v1/experts/b", json=body), 400)["param"] == param
    assert error(await own.http.patch("/v1/experts/none", json={}), 404)
    assert own.engine.dropped == []


async def test_delete(own: House) -> None:
    digest = (await own.upload(make_expert(own.folder / "e", name="cron", exemplars=tuple(CRON)))).json()["digest"]
    response = await own.http.delete("/v1/experts/cron")
    assert response.status_code == 200
    assert response.json() == {"id": "cron", "object": "expert", "deleted": True}
    assert own.engine.dropped == [digest]
    assert error(await own.chat(model="cron"), 404)
    assert (await own.chat(CRON[2], model="auto")).headers["x-switchyard-mix"] == "base"
    assert error(await own.http.delete("/v1/experts/cron"), 404)["code"] == "model_not_found"


async def test_what_is_removed_goes_after_its_grace_period(tmp_path: Path) -> None:
    async with open_house(tmp_path, gc_grace=0) as house:
        await house.upload(make_expert(tmp_path / "a", value=1, name="a"))
        await house.upload(make_expert(tmp_path / "b", value=2, name="b"))
        blobs = tmp_path / "data" / "blobs"
        assert len(list(blobs.glob("*/*"))) == 2
        await house.http.delete("/v1/experts/a")
        while len(left := list(blobs.glob("*/*"))) > 1:
            await asyncio.sleep(0.01)
        assert [path.name for path in left] == [house.registry.get("b").digest]


async def test_uploads_and_deletes_at_once_leave_no_half_state(own: House) -> None:
    paths = [make_expert(own.folder / f"e{i}", value=i + 1, exemplars=tuple(CRON)) for i in range(3)]
    calls = [own.upload(path, name="cron") for path in paths * 2]
    calls += [own.http.delete("/v1/experts/cron") for _ in range(2)]
    statuses = sorted(response.status_code for response in await asyncio.gather(*calls))
    assert set(statuses) <= {200, 201, 404, 409}
    routed = (await own.http.post("/v1/route", json={"prompt": CRON[2]})).json()["mix"]
    assert {part["digest"] for part in routed} == {record.digest for record in own.registry.list()}


async def test_models(house: House) -> None:
    sdk = house.openai()
    listed = [model.model_dump(exclude_unset=True) async for model in sdk.models.list()]
    assert [model["id"] for model in listed] == [BASE, "auto", "cron", "french"]
    assert [model["parent"] for model in listed] == [None, BASE, BASE, BASE]
    record = house.registry.get("cron")
    assert listed[2] == {
        "id": "cron",
        "object": "model",
        "created": record.created,
        "owned_by": "switchyard",
        "root": record.digest,
        "parent": BASE,
        "digest": record.digest,
        "bytes": record.bytes,
    }
    for model in listed:
        assert (await sdk.models.retrieve(model["id"])).model_dump(exclude_unset=True) == model
    detail = error(await house.http.get("/v1/models/no/such"), 404)
    assert (detail["code"], detail["param"]) == ("model_not_found", "model")
