"""Resumable uploads over HTTP, as a client of the tus protocol would speak, and what they are good for."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.house import CRON, House, error, make_expert, open_house

pytestmark = pytest.mark.anyio

PIECE = {"content-type": "application/offset+octet-stream", "tus-resumable": "1.0.0"}


@pytest.fixture(scope="module")
async def module_house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    async with open_house(tmp_path_factory.mktemp("uploads"), max_uploads=3, upload_bytes=1 << 20) as house:
        yield house


@pytest.fixture
async def own(module_house: House) -> AsyncIterator[House]:
    """A server without experts; checks that nothing is left of the uploads of a test."""
    module_house.engine.reset()
    yield module_house
    for upload in (await module_house.http.get("/v1/uploads")).json()["data"]:
        assert (await module_house.http.delete(f"/v1/uploads/{upload['id']}")).status_code == 204
    for record in module_house.registry.list():
        await module_house.http.delete(f"/v1/experts/{record.name}")
    assert module_house.quarantined == []
    assert [path.name for path in module_house.folder.glob("data/uploads/*")] in ([], ["lock"])


async def declare(house: House, data: bytes, *, digest: bool = True) -> str:
    body = {"filename": "e.safetensors", "bytes": len(data)}
    if digest:
        body["sha256"] = hashlib.sha256(data).hexdigest()
    answer = await house.http.post("/v1/uploads", json=body)
    assert answer.status_code in (200, 201), answer.text
    assert answer.headers["location"] == f"/v1/uploads/{answer.json()['id']}"
    return answer.headers["location"]


async def send(house: House, at: str, offset: int, data: Any, **headers: str) -> httpx.Response:
    return await house.http.patch(at, content=data, headers=PIECE | {"upload-offset": str(offset)} | headers)


async def sent(house: House, data: bytes) -> str:
    """The id of a whole upload."""
    at = await declare(house, data)
    assert (await send(house, at, 0, data)).status_code == 204
    return at.rpartition("/")[2]


async def test_in_pieces_and_published(own: House) -> None:
    path = make_expert(own.folder / "e", exemplars=tuple(CRON))
    data = path.read_bytes()
    at = await declare(own, data)
    first = await send(own, at, 0, data[:100])
    assert (first.status_code, first.headers["upload-offset"], first.headers["tus-resumable"]) == (204, "100", "1.0.0")
    head = await own.http.head(at)
    assert (head.status_code, head.headers["upload-offset"], head.headers["cache-control"]) == (200, "100", "no-store")
    assert head.headers["upload-length"] == str(len(data))
    assert (await declare(own, data)) == at, "the same file again is gone on with"
    detail = error(await own.http.post("/v1/experts", json={"upload": at.rpartition("/")[2]}), 409)
    assert (detail["code"], detail["param"]) == ("upload_incomplete", "upload")
    assert (await send(own, at, 100, data[100:])).headers["upload-offset"] == str(len(data))
    answer = (await own.http.get(at)).json()
    assert (answer["status"], answer["sha256"]) == ("complete", hashlib.sha256(data).hexdigest())
    published = await own.http.post("/v1/experts", json={"upload": answer["id"], "name": "cron"})
    assert published.status_code == 201, published.text
    assert published.json() == (await own.upload(path, name="cron")).json()
    assert (await own.chat(CRON[2], model="auto")).headers["x-switchyard-mix"] == "cron=1"
    assert error(await own.http.get(at), 404)["code"] == "upload_not_found"


async def test_exemplars_and_replacement(own: House) -> None:
    old, new = (make_expert(own.folder / f"e{value}", value=value).read_bytes() for value in (1, 2))
    body: dict[str, Any] = {"upload": await sent(own, old), "name": "cron", "exemplars": CRON}
    assert (await own.http.post("/v1/experts", json=body)).json()["exemplar_count"] == len(CRON)
    upload = await sent(own, new)
    assert error(await own.http.post("/v1/experts", json={"upload": upload, "name": "cron"}), 409)
    assert error(await own.http.put("/v1/experts/cron", json={"upload": upload, "name": "x"}), 400)["param"] == "name"
    replaced = await own.http.put("/v1/experts/cron", json={"upload": upload})
    assert replaced.status_code == 200, "a conflict did not use the upload up"
    assert replaced.json()["digest"] == hashlib.sha256(new).hexdigest()


async def test_a_file_that_is_no_use_is_gone(own: House) -> None:
    upload = await sent(own, b"no expert at all")
    assert error(await own.http.post("/v1/experts", json={"upload": upload}), 400)["code"] == "invalid_expert_file"
    assert error(await own.http.get(f"/v1/uploads/{upload}"), 404)


async def test_created_by_headers(own: House) -> None:
    def pair(key: str, value: str) -> str:
        return f"{key} {base64.b64encode(value.encode()).decode()}"

    digest = hashlib.sha256(b"hello").hexdigest()
    headers = {
        "tus-resumable": "1.0.0",
        "upload-length": "5",
        "upload-metadata": f"{pair('filename', 'my file.bin')},{pair('sha256', digest)},empty ",
    }
    created = await own.http.post("/v1/uploads", headers=headers)
    assert created.status_code == 201, created.text
    answer = created.json()
    assert (answer["filename"], answer["bytes"], answer["sha256"], answer["offset"]) == ("my file.bin", 5, digest, 0)
    assert (await send(own, created.headers["location"], 0, b"hello")).status_code == 204
    assert (await own.http.delete(created.headers["location"])).status_code == 204
    for bad in (
        {"upload-length": "x"},
        {"upload-length": "0"},
        {"upload-length": "0" * 5000 + "1" * 5000},
        {"upload-length": str(2**53 + 1)},
        {"upload-length": "5", "upload-metadata": "a b,c"},
        {"upload-length": "5", "upload-metadata": "a /w=="},
        {"upload-metadata": ""},
    ):
        assert error(await own.http.post("/v1/uploads", headers=bad), 400)["param"].startswith("Upload-")
    both = await own.http.post("/v1/uploads", headers={"upload-length": "5"}, json={"filename": "a", "bytes": 5})
    assert error(both, 400)["param"] == "Upload-Length"


async def test_what_is_spoken_here(own: House) -> None:
    options = await own.http.options("/v1/uploads")
    assert (options.status_code, options.headers["tus-version"]) == (204, "1.0.0")
    assert options.headers["tus-max-size"] == str(1 << 20)
    other = await own.http.post("/v1/uploads", headers={"tus-resumable": "0.2.2", "upload-length": "5"})
    assert error(other, 412)
    assert other.headers["tus-version"] == "1.0.0"


async def test_pieces_that_cannot_be(own: House) -> None:
    at = await declare(own, b"hello")
    detail = error(await send(own, at, 1, b"x"), 409)
    assert (detail["code"], detail["param"]) == ("upload_offset_mismatch", "Upload-Offset")
    assert error(await own.http.patch(at, content=b"x", headers=PIECE), 400)["param"].lower() == "upload-offset"
    assert error(await send(own, at, 0, b"x", **{"content-type": "text/plain"}), 415)
    assert error(await send(own, at, 0, b"x" * 6), 413)["param"] == "bytes"
    assert error(await send(own, at + "0", 0, b"x"), 404)["code"] == "upload_not_found"
    assert error(await send(own, at, 0, b"jello"), 400)["code"] == "checksum_mismatch"
    assert error(await own.http.get(at), 404)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"filename": "../e", "bytes": 1}, "filename"),
        ({"filename": "e"}, "bytes"),
        ({"filename": "e", "bytes": 0}, "bytes"),
        ({"filename": "e", "bytes": "1"}, "bytes"),
        ({"filename": "e", "bytes": 1, "sha256": "x"}, "sha256"),
        ({"filename": "e", "bytes": 1, "path": "x"}, "path"),
    ],
)
async def test_uploads_that_cannot_be(own: House, body: Any, param: str) -> None:
    assert error(await own.http.post("/v1/uploads", json=body), 400)["param"] == param


async def test_bodies_that_are_no_json(own: House) -> None:
    for bad in (b"{", b"\xff", b"[" * 100_000, b"", b"[]"):
        assert error(await own.http.post("/v1/uploads", content=bad), 400)
    headers = {"content-type": "application/json"}
    assert error(await own.http.post("/v1/experts", content=b" " * (3 << 20), headers=headers), 413)
    for body, param in (({}, "upload"), ({"upload": "x", "replace": True}, "replace"), ({"upload": 1}, "upload")):
        assert error(await own.http.post("/v1/experts", json=body), 400)["param"] == param
    assert error(await own.http.post("/v1/experts", json={"upload": "x"}), 404)["code"] == "upload_not_found"


async def test_bounds(own: House) -> None:
    at = await declare(own, b"x" * 1000)
    assert error(await own.http.post("/v1/uploads", json={"filename": "e", "bytes": 1 << 20}), 413)
    await declare(own, b"y", digest=False)
    await declare(own, b"y", digest=False)
    full = await own.http.post("/v1/uploads", json={"filename": "e", "bytes": 1})
    assert error(full, 429)
    assert int(full.headers["retry-after"]) > 0
    await own.http.delete(at)
    await declare(own, b"y", digest=False)


async def test_a_client_that_goes_away_can_go_on_and_cuts_off_its_former_self(own: House) -> None:
    data = b"0123456789"
    at = await declare(own, data)
    begun = asyncio.Event()

    async def stuck() -> AsyncIterator[bytes]:
        yield data[:4]
        begun.set()
        await asyncio.sleep(3600)

    former = asyncio.create_task(send(own, at, 0, stuck()))
    await begun.wait()
    answer = await send(own, at, 4, data[4:])
    while answer.status_code == 409:  # what the former one had brought came meanwhile
        offset = int((await own.http.head(at)).headers["upload-offset"])
        answer = await send(own, at, offset, data[offset:])
    assert answer.status_code == 204, answer.text
    assert error(await former, 409)["code"] == "upload_in_use"
    assert (await own.http.get(at)).json()["status"] == "complete"


async def test_a_restart_forgets_nothing(tmp_path: Path) -> None:
    data = make_expert(tmp_path / "e", name="cron").read_bytes()
    async with open_house(tmp_path) as house:
        at = await declare(house, data)
        await send(house, at, 0, data[:50])
    async with open_house(tmp_path) as house:
        assert (await house.http.head(at)).headers["upload-offset"] == "50"
        assert (await send(house, at, 50, data[50:])).status_code == 204
    async with open_house(tmp_path) as house:
        published = await house.http.post("/v1/experts", json={"upload": at.rpartition("/")[2]})
        assert published.status_code == 201, published.text
        assert (await house.chat(model="cron")).headers["x-switchyard-mix"] == "cron=1"


async def test_an_expert_has_its_own_limit(tmp_path: Path) -> None:
    async with open_house(tmp_path, max_upload_bytes=1000) as house:
        upload = await sent(house, b"x" * 2000)
        assert error(await house.http.post("/v1/experts", json={"upload": upload}), 413)["param"] == "upload"
        assert house.quarantined == []
