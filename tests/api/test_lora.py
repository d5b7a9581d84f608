"""vLLM's routes for adapters: a folder on the server becomes an expert, by a real job."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from server.jobs import jobs
from store.fingerprint import manifest_of
from tests.api.dummy_engine import DummyEngine
from tests.api.house import House, error, make_expert, open_house
from tests.e2e.test_raw import save_adapter
from tests.tiny import save_base

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    folder = tmp_path_factory.mktemp("lora")
    base = save_base(folder / "base", "llama")
    (folder / "adapters").mkdir()
    save_adapter(folder / "adapters/one")
    save_adapter(folder / "elsewhere")
    engine = DummyEngine()
    engine.base = dataclasses.replace(engine.base, manifest=manifest_of(base, None))
    settings = {"lora_dirs": str(folder / "adapters"), "api_keys": "root"}
    async with open_house(folder, engine=engine, base_folder=base, **settings) as house:
        house.http.headers["authorization"] = "Bearer root"
        yield house


@pytest.mark.slow
async def test_load_ask_and_unload(served: House) -> None:
    body = {"lora_name": "mine", "lora_path": str(served.folder / "adapters/one")}
    loaded = await served.http.post("/v1/load_lora_adapter", json=body)
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'mine' added successfully.")
    assert served.registry.get("mine").codec == "low-rank"
    models = (await served.http.get("/v1/models")).json()["data"]
    assert ("mine", "dummy-base") in [(model["id"], model["parent"]) for model in models]
    assert (await served.chat(model="mine")).headers["x-switchyard-mix"] == "mine=1"
    assert error(await served.http.post("/v1/load_lora_adapter", json=body), 409)["param"] == "lora_name"
    again = await served.http.post("/v1/load_lora_adapter", json={**body, "load_inplace": True})
    assert again.status_code == 200
    gone = await served.http.post("/v1/unload_lora_adapter", json={"lora_name": "mine", "lora_int_id": 1})
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'mine' removed successfully.")
    error(await served.http.post("/v1/unload_lora_adapter", json={"lora_name": "mine"}), 404)


async def test_load_replace_and_unload_with_a_quick_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_MODULE", "tests.server.strange_job")
    for value in (1, 2):
        (tmp_path / f"adapters/{value}").mkdir(parents=True)
        made = make_expert(tmp_path / f"made-{value}", value=value)
        made.rename(tmp_path / f"adapters/{value}/model.safetensors")
    async with open_house(tmp_path, lora_dirs=str(tmp_path / "adapters")) as house:
        for value, inplace in ((1, False), (2, True)):
            body = {"lora_name": "mine", "lora_path": str(tmp_path / f"adapters/{value}"), "load_inplace": inplace}
            loaded = await house.http.post("/v1/load_lora_adapter", json=body)
            assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'mine' added successfully.")
        assert len(house.registry.get("mine").versions) == 2
        assert error(await house.http.post("/v1/load_lora_adapter", json={**body, "load_inplace": False}), 409)
        assert (tmp_path / "adapters/2/model.safetensors").exists(), "it is the operator's, and stays"
        gone = await house.http.post("/v1/unload_lora_adapter", json={"lora_name": "mine"})
        assert gone.text == "Success: LoRA adapter 'mine' removed successfully."


async def test_paths_that_are_not_allowed_are_not_there(served: House) -> None:
    for path in (served.folder / "elsewhere", served.folder / "adapters/../elsewhere", served.folder / "nowhere"):
        body = {"lora_name": "x", "lora_path": str(path)}
        detail = error(await served.http.post("/v1/load_lora_adapter", json=body), 404)
        assert (detail["param"], detail["code"]) == ("lora_path", "adapter_not_found")
    detail = error(await served.http.post("/v1/load_lora_adapter", json={"lora_name": "x"}), 400)
    assert detail["param"] == "lora_path"


async def test_it_takes_an_administrator_and_a_folder(served: House, shared_house: House) -> None:
    made = await served.http.post("/v1/admin/keys", json={"tenant": "acme", "roles": ["infer", "upload"]})
    headers = {"authorization": f"Bearer {made.json()['key']}"}
    body = {"lora_name": "x", "lora_path": str(served.folder / "adapters/one")}
    refused = await served.http.post("/v1/load_lora_adapter", json=body, headers=headers)
    assert error(refused, 403)["code"] == "insufficient_role"
    detail = error(await shared_house.http.post("/v1/load_lora_adapter", json=body), 403)
    assert "lora_dirs" in detail["message"]


@pytest.mark.slow
async def test_what_is_no_adapter_says_why(served: House) -> None:
    folder = served.folder / "adapters/broken"
    save_adapter(folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "VERA"}')
    body = {"lora_name": "x", "lora_path": str(folder)}
    detail = error(await served.http.post("/v1/load_lora_adapter", json=body), 400)
    assert detail["param"] == "lora_path"
    assert "VERA" in detail["message"] or "peft_type" in detail["message"]
