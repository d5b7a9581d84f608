"""Signed experts over HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from store.expert_file import digest_of
from store.signature import fingerprint
from tests.api.house import House, error, make_expert, open_house
from tests.store.keys import ADA, MALLORY

pytestmark = pytest.mark.anyio


@pytest.fixture
async def strict(tmp_path: Path) -> AsyncIterator[House]:
    async with open_house(tmp_path, trusted_keys=ADA.line, require_signature=True) as house:
        yield house


async def test_signed_experts_only(strict: House) -> None:
    path = make_expert(strict.folder / "e", value=1, name="cron")
    digest = digest_of(path)
    for fields, status, code in (
        ({}, 403, "signature_required"),
        ({"signature": MALLORY.sign(digest)}, 403, "untrusted"),
        ({"signature": ADA.sign("0" * 64)}, 400, "invalid_signature"),
        ({"signature": "x"}, 400, "invalid_signature"),
    ):
        detail = error(await strict.upload(path, **fields), status)
        assert (detail["code"], detail["param"]) == (code, "signature")
    assert error(await strict.upload(path, signature="x" * 300), 413)["param"] == "signature"
    assert strict.registry.list() == []
    signature = ("e.sig", f"{ADA.sign(digest)}\n".encode())
    made = await strict.http.post("/v1/experts", files={"file": ("e", path.read_bytes()), "signature": signature})
    assert made.status_code == 201
    signer = {"name": "ada@example.org", "fingerprint": fingerprint(ADA.raw)}
    assert made.json()["signed_by"] == signer
    assert (await strict.http.get("/v1/experts/cron")).json()["signed_by"] == signer
    assert (await strict.chat(model="cron")).status_code == 200

    new = make_expert(strict.folder / "new", value=2)
    put = {"file": ("e", new.read_bytes())}
    assert error(await strict.http.put("/v1/experts/cron", files=put), 403)["code"] == "signature_required"
    data = {"signature": ADA.sign(digest_of(new))}
    assert (await strict.http.put("/v1/experts/cron", files=put, data=data)).status_code == 200


async def test_a_file_that_came_in_pieces_is_kept_for_a_better_signature(strict: House) -> None:
    path = make_expert(strict.folder / "e", value=1)
    size = path.stat().st_size
    upload = (await strict.http.post("/v1/uploads", json={"filename": "e", "bytes": size})).json()
    headers = {"Upload-Offset": "0", "Content-Type": "application/offset+octet-stream"}
    await strict.http.patch(f"/v1/uploads/{upload['id']}", content=path.read_bytes(), headers=headers)
    body = {"upload": upload["id"], "name": "cron"}
    assert error(await strict.http.post("/v1/experts", json=body), 403)["code"] == "signature_required"
    made = await strict.http.post("/v1/experts", json=body | {"signature": ADA.sign(digest_of(path))})
    assert made.status_code == 201


async def test_what_others_wrote_to_the_store_is_not_served(tmp_path: Path) -> None:
    async with open_house(tmp_path) as lax:
        await lax.upload(make_expert(tmp_path / "e", value=1, name="cron"))
    async with open_house(tmp_path, trusted_keys=ADA.line, require_signature=True) as strict:
        assert (await strict.http.get("/v1/experts")).json()["data"] == []
        assert error(await strict.chat(model="cron"), 403)["code"] == "untrusted"
        assert error(await strict.http.get("/v1/experts/cron"), 403)["code"] == "untrusted"
        made = await strict.upload(tmp_path / "e", signature=ADA.sign(digest_of(tmp_path / "e")))
        assert made.status_code == 200
        assert (await strict.chat(model="cron")).status_code == 200
