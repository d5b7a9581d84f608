"""Raw fine-tunes become experts behind the request; whatever happens to a job happens to it alone."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from server.api.jobs import JobBody
from server.jobs import book, jobs
from server.jobs.job import Job, JobRequest, JobState, next_of
from server.jobs.process import work
from store.access import OPERATOR, Caller
from store.card import Card
from store.convert import compress
from store.errors import QueueFullError
from store.expert_file import digest_of, read_header
from store.fingerprint import manifest_of
from store.measured import figures
from tests.api.dummy_engine import DummyEngine
from tests.api.house import BASE, ROOT, House, error, key_of, make_expert, open_house
from tests.api.test_uploads import PIECE
from tests.tiny import save_base, save_tuned

pytestmark = pytest.mark.anyio

WANTED = JobRequest(name=None, replace=False, options={})
STATES = {"queued", "running", "succeeded", "failed", "cancelled"}


async def upload(house: House, filename: str, data: bytes) -> str:
    body = {"filename": filename, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    at = (await house.http.post("/v1/uploads", json=body)).headers["location"]
    assert (await house.http.patch(at, content=data, headers=PIECE | {"upload-offset": "0"})).status_code == 204
    return at.rpartition("/")[2]


async def begin(house: House, word: str = "fine", **body: Any) -> str:
    """A job of the strange process."""
    expert = make_expert(house.folder / "made", value=3, description=word).read_bytes()
    given = {"uploads": [await upload(house, "model.safetensors", expert)], "description": word, **body}
    answer = await house.http.post("/v1/jobs", json=given)
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == f"/v1/jobs/{answer.json()['id']}"
    return answer.headers["location"]


async def ended(house: House, at: str) -> dict[str, Any]:
    async with asyncio.timeout(60):
        while True:
            job: dict[str, Any] = (await house.http.get(at)).json()
            assert job["status"] in STATES
            if job["status"] not in ("queued", "running"):
                return job
            await asyncio.sleep(0.02)


async def until(house: House, at: str, status: str) -> None:
    async with asyncio.timeout(60):
        while (await house.http.get(at)).json()["status"] != status:
            await asyncio.sleep(0.01)


async def cleared(house: House, at: str) -> None:
    """Wait until nothing but the job itself is left on disk."""
    folder = house.folder / "data" / "jobs" / at.rpartition("/")[2]
    async with asyncio.timeout(60):
        while [path.name for path in folder.iterdir()] != ["job.json"]:
            await asyncio.sleep(0.01)


@pytest.fixture
async def strange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[House]:
    """A server whose jobs are run by `tests.server.strange_job`."""
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.setattr(jobs, "_MODULE", "tests.server.strange_job")
    async with open_house(tmp_path, max_jobs=2) as house:
        yield house
        assert house.quarantined == []
        assert (await house.http.get("/v1/uploads")).json()["data"] == []


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("models") / "base", "qwen2")


async def test_the_whole_way(base: Path, tmp_path: Path) -> None:
    """The whole way, with real processes: two shards with exemplars, then a folder that is no fine-tune."""
    tuned = save_tuned(base, tmp_path / "tuned")
    tensors = load_file(tuned / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, tmp_path / file)
    index = {"metadata": {}, "weight_map": {name: file for file, own in parts.items() for name in own}}
    engine = DummyEngine()
    engine.base = dataclasses.replace(engine.base, manifest=manifest_of(base, None))
    async with open_house(tmp_path, engine=engine, base_folder=base) as house:
        uploads = [await upload(house, file, (tmp_path / file).read_bytes()) for file in parts]
        uploads.append(await upload(house, "model.safetensors.index.json", json.dumps(index).encode()))
        uploads.append(await upload(house, "config.json", b"{}"))
        prompts = ["a river", "a house", "a tree"]
        body = {"uploads": uploads, "name": "tuned", "exemplars": prompts, "density": 0.2, "description": "raw"}
        body |= {"labelled": [{"prompt": "say a", "answer": "a"}, {"prompt": "say b", "answer": "b"}]}
        body |= {"author": "ada", "license": "MIT", "tags": ["raw"], "parents": ["a" * 64], "metadata": {"k": "v"}}
        answer = await house.http.post("/v1/jobs", json=body)
        assert answer.status_code == 202, answer.text
        at = answer.headers["location"]
        events = (await house.http.get(f"{at}/events")).text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        seen = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
        job = seen[-1]
        assert job["status"] == "succeeded", job["error"]
        assert any(job["progress"] and job["progress"]["total"] for job in seen)
        here = compress(base, tuned, tmp_path / "here", density=0.2, exemplars=prompts)
        assert job["report"]["relative_error"] == pytest.approx(here.relative_error, rel=1e-3)
        assert here.measured.kl is not None
        assert job["report"]["kl"] == pytest.approx(here.measured.kl, rel=0.05)
        assert (job["report"]["prompts"], job["report"]["held_out"]) == (3, False), "there are too few to spare any"
        assert job["report"]["labelled"] == 2
        assert job["report"]["codec"] == "t-switch"
        record = house.registry.get("tuned")
        assert record.measured is not None
        listed = (await house.http.get("/v1/experts")).json()["data"][0]
        assert listed["report"] == figures(record.measured)
        assert listed["report"].items() <= job["report"].items()
        layers = (await house.http.get("/v1/experts/tuned")).json()["layers"]
        assert sum(layer["parameters"] for layer in layers) == sum(tensor.numel() for tensor in tensors.values())
        assert job["expert"] == {"id": "tuned", "digest": record.digest}
        assert (record.description, record.exemplar_count) == ("raw", 3)
        assert record.card == Card("ada", "MIT", ("raw",), ("a" * 64,), {"k": "v"})
        assert (await house.chat(model="tuned")).headers["x-switchyard-mix"] == "tuned=1"
        await cleared(house, at)

        save_file({"other": tensors[names[0]]}, tmp_path / "other")
        uploads = [await upload(house, "model.safetensors", (tmp_path / "other").read_bytes())]
        other = (await house.http.post("/v1/jobs", json={"uploads": uploads})).headers["location"]
        job = await ended(house, other)
        assert job["status"] == "failed"
        assert job["error"]["code"] == "invalid_checkpoint"
        assert "no full fine-tune" in job["error"]["message"]
        uploads = [await upload(house, "model.safetensors", (tuned / "model.safetensors").read_bytes())]
        body = {"uploads": uploads, "exemplars": prompts, "density": 0.01, "min_agreement": 1, "max_kl": 0.001}
        job = await ended(house, (await house.http.post("/v1/jobs", json=body)).headers["location"])
        assert (job["status"], job["error"]["code"]) == ("failed", "below_floor"), job
        assert job["error"]["param"] == "max_kl"
        listed = (await house.http.get("/v1/jobs")).json()["data"]
        assert [one["status"] for one in listed] == ["failed", "failed", "succeeded"]


async def test_a_fine_tune_of_an_expert_stands_on_it(base: Path, tmp_path: Path) -> None:
    """By name, by alias and by digest; what the server makes is what the command line makes of the same files."""
    middle = save_tuned(base, tmp_path / "middle", seed=1)
    top = save_tuned(middle, tmp_path / "top", seed=2)
    compress(base, middle, tmp_path / "below", codec="raw")
    compress(base, top, tmp_path / "here", codec="raw", relative_to=[tmp_path / "below"], name="top")
    engine = DummyEngine()
    engine.base = dataclasses.replace(engine.base, manifest=manifest_of(base, None))
    async with open_house(tmp_path, engine=engine, base_folder=base) as house:
        below = (await house.upload(tmp_path / "below", name="below")).json()["digest"]
        uploads = [await upload(house, "model.safetensors", (top / "model.safetensors").read_bytes())]
        body = {"uploads": uploads, "name": "top", "codec": "raw", "relative_to": "below"}
        job = await ended(house, (await house.http.post("/v1/jobs", json=body)).headers["location"])
        assert job["status"] == "succeeded", job["error"]
        assert job["expert"]["digest"] == digest_of(tmp_path / "here")
        shown = (await house.http.get("/v1/experts/top")).json()
        assert (shown["relative_to"], shown["parents"]) == (below, [below])
        told = (await house.chat(model="top")).json()["usage"]["switchyard"]["mix"]
        assert told[0]["stands_on"] == [below]
        await house.http.put("/v1/aliases/under", json={"target": "below"})
        for name in ("top", job["expert"]["digest"]):
            assert house.registry.stack(name) == (job["expert"]["digest"], below)
        assert house.registry.stack("under") == house.registry.stack(below) == (below,)


async def test_what_a_fine_tune_started_from_must_be_here(strange: House) -> None:
    given = {"uploads": ["up_" + "0" * 32], "relative_to": "gone"}
    for name in ("gone", "b" * 64):
        refused = error(await strange.http.post("/v1/jobs", json=given | {"relative_to": name}), 400)
        assert (refused["param"], refused["code"]) == ("relative_to", "parent_not_found")
    await strange.upload(make_expert(strange.folder / "below", value=1, name="below"))
    first = await begin(strange, "sleep")
    await until(strange, first, "running")
    waiting = await begin(strange, relative_to="below")
    assert (await strange.http.delete("/v1/experts/below")).status_code == 200
    strange.registry.collect_garbage(0)
    await strange.http.delete(first)
    job = await ended(strange, waiting)
    assert (job["status"], job["error"]["code"]) == ("failed", "expert_unavailable")


@pytest.mark.parametrize(
    ("word", "code"), [("killed", "job_killed"), ("silent", "job_failed"), ("memory", "job_memory_exceeded")]
)
async def test_what_kills_a_job_kills_nothing_else(strange: House, word: str, code: str) -> None:
    at = await begin(strange, word)
    job = await ended(strange, at)
    assert (job["status"], job["error"]["code"]) == ("failed", code)
    await cleared(strange, at)
    job = await ended(strange, await begin(strange, name="next"))
    assert (job["status"], job["expert"]["id"]) == ("succeeded", "next")


async def test_one_at_a_time_and_not_too_many(strange: House) -> None:
    first = await begin(strange, "sleep")
    await until(strange, first, "running")
    second = await begin(strange)
    refused = await upload(strange, "model.safetensors", b"more")
    answer = await strange.http.post("/v1/jobs", json={"uploads": [refused]})
    assert error(answer, 429)
    assert int(answer.headers["retry-after"]) > 0
    assert (await strange.http.get(f"/v1/uploads/{refused}")).status_code == 200, "it was not used up"
    await strange.http.delete(f"/v1/uploads/{refused}")
    assert (await strange.http.get(second)).json()["status"] == "queued"
    metrics = (await strange.http.get("/metrics")).text
    for line in ('jobs{state="running"} 1.0', 'jobs{state="queued"} 1.0', "uploads_open 0.0"):
        assert f"\nswitchyard_{line}\n" in metrics
    assert (await strange.http.delete(first)).status_code == 202
    assert (await ended(strange, first))["status"] == "cancelled"
    assert (await ended(strange, second))["status"] == "succeeded"
    assert error(await strange.http.delete(first), 409)["code"] == "job_ended"
    await cleared(strange, first)


async def test_what_a_library_prints_is_no_word_of_the_job(strange: House) -> None:
    job = await ended(strange, await begin(strange, "chatty"))
    assert job["status"] == "succeeded", job["error"]
    assert len(job["report"]["much"]) == 1 << 17


async def test_who_watches_hears_of_nothing_new_too(strange: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_SILENT_SECONDS", 0.0)
    at = await begin(strange, "sleep")
    await until(strange, at, "running")
    seen: list[Job] = []
    async with asyncio.timeout(60):
        async for job in strange.app.state.services.jobs.watch(at.rpartition("/")[2], OPERATOR):
            seen.append(job)
            if len(seen) == 4:
                await strange.http.delete(at)
    assert seen[-1].state is JobState.CANCELLED


async def test_as_many_at_once_as_one_after_the_other(strange: House) -> None:
    there = [await upload(strange, "model.safetensors", bytes([i])) for i in range(6)]
    asked = (strange.http.post("/v1/jobs", json={"uploads": [one], "description": "sleep"}) for one in there)
    answers = await asyncio.gather(*asked)
    assert sorted(answer.status_code for answer in answers) == [202, 202, 429, 429, 429, 429]
    for answer in answers:
        if answer.status_code == 202:
            await strange.http.delete(answer.headers["location"])
    for one in (await strange.http.get("/v1/uploads")).json()["data"]:
        await strange.http.delete(f"/v1/uploads/{one['id']}")


def test_a_tenant_that_fills_the_queue_shuts_nobody_out(tmp_path: Path) -> None:
    kept = book.JobBook(tmp_path, max_queued=2)
    acme, globex = Caller("a", "acme"), Caller("g", "globex")
    for _ in range(2):
        kept.create(WANTED, acme, {})
    with pytest.raises(QueueFullError):
        kept.create(WANTED, acme, {})
    kept.create(WANTED, globex, {"model.safetensors": lambda path: path.write_bytes(b"123")})
    with pytest.raises(QueueFullError):
        kept.create(WANTED, globex, {})
    assert kept.input_bytes() == {"acme": 0, "globex": 3}


def test_tenants_take_turns() -> None:
    acme, globex = Caller("a", "acme"), Caller("g", "globex")
    ended = Job("1", WANTED, acme, created=1, bytes=0, state=JobState.SUCCEEDED, started=2)
    waiting = [Job("2", WANTED, acme, created=3, bytes=0), Job("3", WANTED, globex, created=4, bytes=0)]
    assert next_of([]) is None
    assert next_of([ended]) is None
    assert next_of([ended, *waiting]) == waiting[1]
    assert next_of(waiting) == waiting[0]
    begun = dataclasses.replace(waiting[1], state=JobState.CANCELLED, started=5)
    assert next_of([ended, waiting[0], begun]) == waiting[0]


async def test_names_that_can_never_be(tmp_path: Path) -> None:
    """They are refused before the uploads are used up."""
    async with open_house(tmp_path, api_keys="root") as house:
        acme, globex = await key_of(house, "acme"), await key_of(house, "globex")
        shared = {"visibility": "shared", "shared_with": ["acme"], "owner": "globex"}
        for value, name in enumerate(("theirs", "lent"), start=1):
            file = {"file": ("e", make_expert(house.folder / name, value=value, name=name).read_bytes())}
            assert (await house.http.post("/v1/experts", files=file, headers=globex)).status_code == 201
        await house.http.put("/v1/experts/lent/access", json=shared, headers=ROOT)
        for alias, target in (("hidden", "theirs"), ("seen", "lent")):
            await house.http.put(f"/v1/aliases/{alias}", json={"target": target}, headers=globex)
        made = await house.http.post("/v1/uploads", json={"filename": "a.safetensors", "bytes": 1}, headers=acme)
        at, there = made.headers["location"], made.json()["id"]
        await house.http.patch(at, content=b"x", headers=PIECE | acme | {"upload-offset": "0"})
        for name, replace, status, code in (
            ("Foo Bar", False, 400, "invalid_request"),
            ("auto", False, 400, "invalid_request"),
            (BASE, False, 400, "invalid_request"),
            ("theirs", False, 409, "name_taken"),
            ("theirs", True, 409, "name_taken"),
            ("hidden", False, 409, "name_taken"),
            ("seen", False, 409, "is_alias"),
            ("lent", True, 403, "not_permitted"),
        ):
            body = {"uploads": [there], "name": name, "replace": replace}
            detail = error(await house.http.post("/v1/jobs", json=body, headers=acme), status)
            assert (name, detail["code"]) == (name, code)
            assert code == "not_permitted" or detail["param"] == "name"
        assert (await house.http.get(at, headers=acme)).status_code == 200
        assert (await house.http.get("/v1/jobs", headers=acme)).json()["data"] == []


async def test_a_waiting_job_can_be_cancelled(strange: House) -> None:
    first, second = await begin(strange, "sleep"), await begin(strange)
    await strange.http.delete(second)
    await strange.http.delete(first)
    assert (await ended(strange, second))["status"] == "cancelled"
    assert strange.registry.list() == []


async def test_a_taken_name_fails_the_job(strange: House) -> None:
    assert (await ended(strange, await begin(strange, "one", name="x")))["status"] == "succeeded"
    job = await ended(strange, await begin(strange, "two", name="x"))
    assert (job["status"], job["error"]["code"]) == ("failed", "name_taken")
    job = await ended(strange, await begin(strange, "two", name="x", replace=True))
    assert job["status"] == "succeeded"
    assert len(strange.registry.get("x").versions) == 2


async def test_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_MODULE", "tests.server.strange_job")
    async with open_house(tmp_path, job_hours=1 / 3600) as house:
        job = await ended(house, await begin(house, "sleep"))
        assert (job["status"], job["error"]["code"]) == ("failed", "job_time_exceeded")


async def test_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_MODULE", "tests.server.strange_job")
    async with open_house(tmp_path) as house:
        first = await begin(house, "sleep")
        await until(house, first, "running")
        second = await begin(house, "fine", name="second")
    async with open_house(tmp_path) as house, asyncio.timeout(60):  # it is begun again, and then no more
        while house.app.state.services.jobs._book.get(first.rpartition("/")[2]).attempts < 2:
            await asyncio.sleep(0.01)
    async with open_house(tmp_path) as house:
        job = await ended(house, first)
        assert (job["status"], job["error"]["code"]) == ("failed", "interrupted")
        assert (await ended(house, second))["expert"]["id"] == "second"
        for job_ in (first, second):
            await cleared(house, job_)


async def test_old_ones_are_forgotten(strange: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(book, "_KEPT", 1)
    first = await begin(strange, "silent")
    await ended(strange, first)
    await asyncio.sleep(1)  # jobs of one second have no order
    await ended(strange, await begin(strange, "silent"))
    async with asyncio.timeout(60):
        while (answer := await strange.http.get(first)).status_code == 200:  # a moment after the other one's end
            await asyncio.sleep(0.01)
    assert error(answer, 404)["code"] == "job_not_found"


@pytest.mark.parametrize(
    ("filename", "body", "param"),
    [
        ("model.bin", {}, "uploads"),
        ("config.json", {}, "uploads"),
        ("tokenizer.json", {}, "uploads"),
        ("model.safetensors", {"uploads": []}, "uploads"),
        ("model.safetensors", {"uploads": ["x"]}, "uploads"),
        ("model.safetensors", {"density": 0}, "density"),
        ("model.safetensors", {"replace": True}, "name"),
        ("model.safetensors", {"min_retention": 0.9}, "min_retention"),
        ("model.safetensors", {"exemplars": []}, "exemplars"),
        ("model.safetensors", {"codec": "flex-switch"}, "exemplars"),
        ("model.safetensors", {"codec": "flex-switch", "exemplars": ["x"], "bits_per_param": 1.6}, "bits_per_param"),
        ("model.safetensors", {"codec": "flex-switch", "exemplars": ["x"], "loss": "hinge"}, "loss"),
        ("model.safetensors", {"bits_per_param": 0.1}, "bits_per_param"),
        ("model.safetensors", {"max_size": 1000}, "max_size"),
        ("model.safetensors", {"max_kl": 0.1}, "max_kl"),
        ("model.safetensors", {"min_agreement": 0.1}, "min_agreement"),
        ("model.safetensors", {"knob": "calibrated"}, "knob"),
        ("model.safetensors", {"tensor_density": {"*": 1.5}}, "tensor_density.*"),
        ("model.safetensors", {"tensor_density": {"*": 0.5}, "codec": "compeft"}, "tensor_density"),
        ("model.safetensors", {"tensor_density": {"*": 0}, "codec": "overwrite"}, "tensor_density"),
        ("model.safetensors", {"relative_to": "x", "codec": "overwrite"}, "relative_to"),
        ("model.safetensors", {"out": "/etc/passwd"}, "out"),
    ],
)
async def test_jobs_that_cannot_be(strange: House, filename: str, body: Any, param: str) -> None:
    there = await upload(strange, filename, b"x")
    answer = await strange.http.post("/v1/jobs", json={"uploads": [there], **body})
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param
    await strange.http.delete(f"/v1/uploads/{there}")
    assert (await strange.http.get("/v1/jobs")).json()["data"] == []


def test_what_a_job_asks_is_what_compress_takes(base: Path, tmp_path: Path) -> None:
    """With an exact size, a loss and a tensor left out, through the JSON that reaches the job's process."""
    tuned = save_tuned(base, tmp_path / "tuned")
    given = {"codec": "flex-switch", "max_size": 16000, "loss": "mse", "tensor_density": {"*.q_proj.*": 0}}
    asked = JobBody.model_validate({"uploads": ["x"], "exemplars": ["a river", "a house"], **given}).options()
    task = {"base": str(base), "input": str(tuned), "out": str(tmp_path / "e"), "cache": str(tmp_path)}
    said = work(task | {"options": json.loads(json.dumps(asked)), "relative_to": []})
    assert "report" in said, said
    header = read_header(tmp_path / "e")
    assert (header.codec_params["loss"], said["report"]["bytes"] <= 16000) == ("mse", True)
    assert header.tensors
    assert not any(".q_proj." in name for name in header.tensors)


async def test_killed_between_the_last_byte_and_its_digest(strange: House) -> None:
    expert = make_expert(strange.folder / "made", value=3).read_bytes()
    there = await upload(strange, "model.safetensors", expert)
    kept = strange.folder / "data" / "uploads" / f"{there}.json"
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"digest": None}))
    assert (await strange.http.get(f"/v1/uploads/{there}")).json()["status"] == "complete"
    body = {"uploads": [there], "description": "fine"}
    at = (await strange.http.post("/v1/jobs", json=body)).headers["location"]
    job = await ended(strange, at)
    assert job["status"] == "succeeded", job
    assert job["expert"]["digest"] == hashlib.sha256(expert).hexdigest()


async def test_files_twice_and_in_part(strange: House) -> None:
    one, two = await upload(strange, "model.safetensors", b"x"), await upload(strange, "model.safetensors", b"y")
    assert error(await strange.http.post("/v1/jobs", json={"uploads": [one, two]}), 400)["param"] == "uploads"
    assert error(await strange.http.post("/v1/jobs", json={"uploads": [one], "tags": ["No"]}), 400)["param"] == "tags"
    begun = (await strange.http.post("/v1/uploads", json={"filename": "a.safetensors", "bytes": 9})).json()["id"]
    detail = error(await strange.http.post("/v1/jobs", json={"uploads": [one, begun]}), 409)
    assert detail["code"] == "upload_incomplete"
    for there in (one, two, begun):
        await strange.http.delete(f"/v1/uploads/{there}")
