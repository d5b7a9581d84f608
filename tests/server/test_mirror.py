"""A watched folder: what is in it is served, what has left it is not, and what is wrong is said once."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from server.api.services import Services
from server.mirror import Mirror
from server.mirror_state import MirrorState
from server.watching import WatchedFolder
from store.errors import InvalidRequestError, StoreError, SwitchyardError
from store.expert_file import digest_of
from tests.api.house import CRON, FRENCH, ROOT, House, key_of, make_expert, open_house
from tests.store.keys import ADA

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "watched"
    path.mkdir()
    return path


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    """A server that watches nothing by itself: the tests tell when to look."""
    async with open_house(tmp_path) as house:
        yield house


def mirror_of(house: House, folder: Path) -> Mirror:
    services: Services = house.app.state.services
    source = WatchedFolder(folder, services.library.quarantine, 1 << 20)
    return Mirror(source, services.library, MirrorState(house.folder / "sources" / "state.json"))


async def settle(mirror: Mirror) -> None:
    """Look often enough for what is there to be taken."""
    for _ in range(2):
        await mirror.sync()


def names(house: House) -> list[str]:
    return [record.name for record in house.registry.list()]


def place(folder: Path, file: str, **info: Any) -> Path:
    """Put an expert file there in one step, as `mv` does."""
    hidden = make_expert(folder / f".{file}.new", **info)
    return hidden.replace(folder / file)


async def test_it_works_by_itself(tmp_path: Path, folder: Path) -> None:
    async with open_house(tmp_path, watch=folder) as house:
        place(folder, "cron.safetensors", exemplars=tuple(CRON))
        async with asyncio.timeout(60):
            while (await house.chat(CRON[2], model="auto")).headers["x-switchyard-mix"] != "cron=1":
                await asyncio.sleep(0.01)
        (folder / "cron.safetensors").unlink()
        async with asyncio.timeout(60):
            while names(house):
                await asyncio.sleep(0.01)
    with pytest.raises(InvalidRequestError, match="no folder") as caught:
        async with open_house(tmp_path, watch=tmp_path / "none"):
            pass
    assert caught.value.param == "watch"


async def test_files_come_change_and_go(house: House, folder: Path) -> None:
    mirror = mirror_of(house, folder)
    await mirror.sync()
    place(folder, "one.safetensors", value=1)
    place(folder, "two.safetensors", value=2, name="named-by-its-header")
    (folder / "notes.txt").write_text("not an expert")
    (folder / ".hidden.safetensors").write_bytes(b"x")
    (folder / "sub.safetensors").mkdir()
    await mirror.sync()
    assert names(house) == [], "whether they are whole shows at the second look"
    await mirror.sync()
    assert names(house) == ["named-by-its-header", "one"]
    first = house.registry.get("one").digest

    place(folder, "one.safetensors", value=3)
    await settle(mirror)
    assert [version.digest for version in house.registry.get("one").versions][1] == first

    (folder / "one.safetensors").unlink()
    await mirror.sync()
    assert names(house) == ["named-by-its-header"]
    (folder / "two.safetensors").replace(folder / "renamed.safetensors")
    await settle(mirror)
    record = house.registry.get("named-by-its-header")
    assert record.earlier == ()
    (folder / "renamed.safetensors").unlink()
    await settle(mirror)
    assert names(house) == []
    assert house.quarantined == []


async def test_a_file_that_is_still_written_waits(house: House, folder: Path) -> None:
    mirror = mirror_of(house, folder)
    whole = make_expert(house.folder / "whole", value=1).read_bytes()
    with (folder / "slow.safetensors").open("wb", buffering=0) as file:
        for start in range(0, len(whole), 200):
            file.write(whole[start : start + 200])
            await mirror.sync()
            assert names(house) == []
    await mirror.sync()
    assert names(house) == ["slow"]


async def test_an_old_file_is_taken_at_the_first_look(
    house: House, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(folder, "old.safetensors")
    monkeypatch.setattr("server.watching._SETTLED_SECONDS", -1.0)
    await mirror_of(house, folder).sync()
    assert names(house) == ["old"]


async def test_exemplars_and_signatures_lie_beside(tmp_path: Path, folder: Path) -> None:
    async with open_house(tmp_path, trusted_keys=ADA.line, require_signature=True) as house:
        mirror = mirror_of(house, folder)
        file = place(folder, "cron.safetensors", exemplars=tuple(FRENCH))
        await settle(mirror)
        assert names(house) == [], "not without a signature"
        (folder / "cron.safetensors.sig").write_text(ADA.sign(digest_of(file)))
        (folder / "cron.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in CRON))
        await settle(mirror)
        assert house.registry.exemplars(house.registry.get("cron")) == CRON
        assert (await house.chat(CRON[2], model="auto")).headers["x-switchyard-mix"] == "cron=1"
        (folder / "cron.jsonl").write_text("not JSON\n")
        await settle(mirror)
        assert house.registry.exemplars(house.registry.get("cron")) == CRON, "the sound ones stay"
        (folder / "cron.jsonl").unlink()
        await settle(mirror)
        assert house.registry.exemplars(house.registry.get("cron")) == FRENCH, "those in the file again"
        assert house.registry.get("cron").digest == digest_of(file)


async def test_what_is_wrong_is_said_once(house: House, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    await house.upload(make_expert(house.folder / "e", value=9, name="taken"))
    mirror = mirror_of(house, folder)
    (folder / "junk.safetensors").write_bytes(b"junk")
    (folder / "BAD NAME.safetensors").write_bytes(make_expert(house.folder / "f", value=2).read_bytes())
    (folder / "large.safetensors").write_bytes(bytes(2 << 20))
    place(folder, "taken.safetensors", value=1)
    place(folder, "good.safetensors", value=3)
    with caplog.at_level(logging.INFO, "server.mirror"):
        for _ in range(5):
            await mirror.sync()
        again = mirror_of(house, folder)  # a restart does not forget it
        for _ in range(3):
            await again.sync()
    said = [record.getMessage() for record in caplog.records]
    for part in ("junk.safetensors", "a name has 1 to 64", "limit of 1048576 bytes", "belongs to another expert"):
        assert len([line for line in said if part in line]) == 1, part
    assert names(house) == ["good", "taken"]
    assert house.registry.get("taken").digest == digest_of(house.folder / "e")
    assert house.quarantined == []
    place(folder, "junk.safetensors", value=4)
    await settle(again)
    assert names(house) == ["good", "junk", "taken"]
    for name in ("taken.safetensors", "junk.safetensors"):
        (folder / name).unlink()
    await again.sync()
    assert names(house) == ["good", "taken"], "what was never ours stays"


async def test_a_restart_knows_what_has_left_meanwhile(house: House, folder: Path) -> None:
    place(folder, "a.safetensors", value=1)
    place(folder, "b.safetensors", value=2)
    await settle(mirror_of(house, folder))
    assert names(house) == ["a", "b"]
    (folder / "a.safetensors").unlink()
    await settle(mirror_of(house, folder))
    assert names(house) == ["b"]


async def test_the_folder_is_right(house: House, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What was deleted over HTTP comes back; what was replaced over HTTP stays, also when the file goes."""
    mirror = mirror_of(house, folder)
    place(folder, "a.safetensors", value=1)
    await settle(mirror)
    await house.http.delete("/v1/experts/a")
    await mirror.sync()
    assert names(house) == ["a"]
    other = make_expert(house.folder / "other", value=2)
    await house.http.put("/v1/experts/a", files={"file": ("e", other.read_bytes())})
    await mirror.sync()
    (folder / "a.safetensors").unlink()
    await mirror.sync()
    assert house.registry.get("a").digest == digest_of(other)
    assert "a stays: it is another file now" in caplog.text


async def test_a_name_that_a_tenant_has_taken_meanwhile_is_its_own(tmp_path: Path, folder: Path) -> None:
    async with open_house(tmp_path, api_keys="root") as house:
        mirror = mirror_of(house, folder)
        place(folder, "a.safetensors", value=1)
        await settle(mirror)
        acme = await key_of(house, "acme")
        own = make_expert(house.folder / "own", value=7)
        await house.http.delete("/v1/experts/a", headers=ROOT)
        files, data = {"file": ("e", own.read_bytes())}, {"name": "a"}
        assert (await house.http.post("/v1/experts", files=files, data=data, headers=acme)).status_code == 201
        place(folder, "a.safetensors", value=2)
        await settle(mirror)
        record = house.registry.get("a")
        assert (record.digest, record.access.owner, record.earlier) == (digest_of(own), "acme", ())
        # Given away as it was published, it follows its file all the same.
        place(folder, "b.safetensors", value=3)
        await settle(mirror)
        access = {"visibility": "private", "owner": "acme"}
        assert (await house.http.put("/v1/experts/b/access", json=access, headers=ROOT)).status_code == 200
        place(folder, "b.safetensors", value=4)
        await settle(mirror)
        assert house.registry.get("b").digest == digest_of(folder / "b.safetensors")


async def test_aliases_keep_an_expert_whose_file_has_gone(
    house: House, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mirror = mirror_of(house, folder)
    place(folder, "a.safetensors")
    await settle(mirror)
    await house.http.put("/v1/aliases/x", json={"target": "a"})
    (folder / "a.safetensors").unlink()
    await mirror.sync()
    assert names(house) == ["a"]
    assert "also called x" in caplog.text


async def test_a_folder_that_cannot_be_read_has_lost_nothing(house: House, folder: Path) -> None:
    mirror = mirror_of(house, folder)
    place(folder, "a.safetensors")
    await settle(mirror)
    folder.rename(house.folder / "elsewhere")
    with pytest.raises(SwitchyardError, match="cannot read"):
        await mirror.sync()
    assert names(house) == ["a"]
    (house.folder / "elsewhere").rename(folder)
    mirror._source._device += 1  # type: ignore[attr-defined]
    (folder / "a.safetensors").unlink()
    with pytest.raises(SwitchyardError, match="not the folder"):
        await mirror.sync()
    assert names(house) == ["a"], "as after an unmount"


async def test_trouble_that_passes_is_tried_again(house: House, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = mirror_of(house, folder)
    place(folder, "a.safetensors", value=77, exemplars=tuple(CRON))
    place(folder, "b.safetensors", value=2)
    await mirror.sync()
    house.engine.features_failure = StoreError("no features today")
    with pytest.raises(StoreError, match="no features"):
        await mirror.sync()
    assert names(house) == ["b"], "one's trouble is not the other's"
    with pytest.raises(StoreError, match="no features"):
        await mirror.sync()
    await mirror.sync()
    house.engine.features_failure = None
    await mirror.sync()
    assert names(house) == ["b"], "not again at every look"
    clock = time.monotonic
    monkeypatch.setattr("server.mirror.time.monotonic", lambda: clock() + 60)
    await mirror.sync()
    assert names(house) == ["a", "b"]


async def test_a_state_that_is_damaged_counts_as_empty(house: House, folder: Path) -> None:
    place(folder, "a.safetensors")
    await settle(mirror_of(house, folder))
    state = house.folder / "sources" / "state.json"
    for text in ("", "{", '{"a.safetensors": 1}', '{"a.safetensors": {"stamp": 1}}'):
        state.write_text(text)
        await settle(mirror_of(house, folder))
        assert names(house) == ["a"]
        assert json.loads(state.read_text())["a.safetensors"]["name"] == "a"


async def test_a_state_that_cannot_be_kept_is_reported(
    house: House, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(folder, "a.safetensors")
    mirror = mirror_of(house, folder)
    await mirror.sync()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(SwitchyardError):
            await mirror.sync()
    await mirror.sync()
    assert names(house) == ["a"]


async def test_files_under_changing_hands(house: House, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that changes while it is copied is not published; one that vanishes neither."""
    mirror = mirror_of(house, folder)
    path = place(folder, "a.safetensors", value=1)
    await mirror.sync()
    real: Callable[..., Any] = WatchedFolder._read_exemplars

    def meddle(self: WatchedFolder, name: str) -> list[str] | None:
        make_expert(path, value=2)
        return real(self, name)

    with monkeypatch.context() as patched:
        patched.setattr(WatchedFolder, "_read_exemplars", meddle)
        with pytest.raises(SwitchyardError, match="changed while"):
            await mirror.sync()
    assert names(house) == []
    await settle(mirror)
    assert house.registry.get("a").digest == digest_of(path)
    assert house.quarantined == []
