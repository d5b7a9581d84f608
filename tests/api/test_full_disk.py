"""A disk that is really full: a small file system of its own. Needs the right to mount one."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from store.upkeep import verify
from tests.api.house import ROOT, House, error, make_expert, open_house
from tests.api.test_uploads import PIECE

pytestmark = pytest.mark.anyio

SIZE = 4 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder `data` on a disk of 4 MiB."""
    folder = tmp_path / "data"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system may be mounted here")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def used(data: Path) -> int:
    """Bytes of experts and uploads."""
    folders = [data / name for name in ("blobs", "records", "quarantine", "uploads")]
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


async def test_uploads_get_507_and_nothing_is_left_of_them(small_disk: Path) -> None:
    data = small_disk / "data"
    async with open_house(small_disk) as house:
        assert (await house.upload(make_expert(small_disk / "e", name="cron"))).status_code == 201
        before = used(data)
        junk = random.Random(0).randbytes(SIZE + 1)
        assert error(await house.http.post("/v1/experts", files={"file": ("e", junk)}), 507)["code"] == "storage_full"
        assert house.quarantined == []
        assert used(data) == before
        declared = await house.http.post("/v1/uploads", json={"filename": "e", "bytes": SIZE})
        assert error(declared, 507)["param"] == "bytes"
        at = (await house.http.post("/v1/uploads", json={"filename": "e", "bytes": SIZE // 2})).headers["location"]
        await send(house, at, 0, junk[: SIZE // 4])
        (data / "something else").write_bytes(junk[: SIZE - used(data) - (SIZE // 8)])
        piece = await house.http.patch(
            at, content=junk[SIZE // 4 : SIZE // 2], headers=PIECE | {"upload-offset": str(SIZE // 4)}
        )
        assert error(piece, 507)["code"] == "storage_full"
        assert (await house.http.head(at)).headers["upload-offset"] == str(SIZE // 4), "what was acknowledged is there"
        assert (await house.chat(model="cron")).headers["x-switchyard-mix"] == "cron=1"
        os.unlink(data / "something else")
        await send(house, at, SIZE // 4, junk[SIZE // 4 : SIZE // 2])
        assert (await house.http.delete(at)).status_code == 204
        answers = await asyncio.gather(*(house.upload(make_expert(small_disk / f"{i}", value=i)) for i in range(2, 6)))
        assert [answer.status_code for answer in answers] == [201] * 4
        assert not [finding for finding in verify(house.registry._store) if finding.verdict.is_fault]


async def test_a_key_that_has_no_room_gets_507_and_is_none(small_disk: Path) -> None:
    data = small_disk / "data"
    async with open_house(small_disk, api_keys="root") as house:
        made = {"tenant": "acme", "roles": ["infer"]}
        assert (await house.http.post("/v1/admin/keys", json=made, headers=ROOT)).status_code == 201
        with (data / "something else").open("wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(1 << 16)):
                pass
        refused = await house.http.post("/v1/admin/keys", json=made, headers=ROOT)
        assert error(refused, 507)["code"] == "storage_full"
        (data / "something else").unlink()
        assert len((await house.http.get("/v1/admin/keys", headers=ROOT)).json()["data"]) == 1
        assert not list(data.rglob("*.tmp"))
        assert (await house.http.post("/v1/admin/keys", json=made, headers=ROOT)).status_code == 201


async def send(house: House, at: str, offset: int, data: bytes) -> None:
    answer = await house.http.patch(at, content=data, headers=PIECE | {"upload-offset": str(offset)})
    assert answer.status_code == 204, answer.text
