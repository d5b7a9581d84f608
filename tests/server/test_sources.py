"""Buckets and repositories whose experts are served, and `switchyard pull`; over HTTP on this machine only."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import fsspec
import huggingface_hub.constants
import pytest

from server.api.services import Services
from server.cli import main
from server.client import Client
from server.mirror import Mirror
from server.mirror_state import MirrorState
from server.remote_source import RemoteSource
from store.errors import InvalidRequestError, NotFoundError, StoreUnavailableError
from store.expert_file import digest_of
from store.remote import parse_location
from tests.api.house import CRON, House, make_expert, open_house
from tests.server.live import live_server
from tests.store.keys import ADA
from tests.store.remote_servers import Bucket, Repository

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def module_bucket() -> Iterator[Bucket]:
    bucket = Bucket()
    yield bucket
    bucket.close()


@pytest.fixture
def bucket(module_bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    for name, value in module_bucket.environment.items():
        monkeypatch.setenv(name, value)
    return module_bucket


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch) -> Iterator[Repository]:
    repository = Repository()
    monkeypatch.setenv("HF_ENDPOINT", repository.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield repository
    repository.close()


@pytest.fixture
def memory() -> Iterator[Any]:
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with open_house(tmp_path) as house:
        yield house


def mirror_of(house: House, url: str, **limits: Any) -> Mirror:
    services: Services = house.app.state.services
    given: dict[str, Any] = {"max_bytes": 1 << 20, "seconds": 60.0, **limits}
    source = RemoteSource(parse_location(url), services.library.quarantine, **given)
    return Mirror(source, services.library, MirrorState(house.folder / "sources" / f"{url.rpartition('/')[2]}.json"))


def expert(house: House, **info: Any) -> bytes:
    return make_expert(house.folder / "made", **info).read_bytes()


def names(house: House) -> list[str]:
    return [record.name for record in house.registry.list()]


def lines(prompts: list[str]) -> bytes:
    return "".join(json.dumps(prompt) + "\n" for prompt in prompts).encode()


async def test_a_bucket(house: House, bucket: Bucket) -> None:
    mirror = mirror_of(house, "s3://bucket/one")
    with pytest.raises(NotFoundError, match="nothing at s3://bucket/one"):
        await mirror.sync()
    bucket.put("one/cron.safetensors", expert(house, value=1))
    bucket.put("one/cron.jsonl", lines(CRON))
    bucket.put("one/sub/other.safetensors", expert(house, value=2))
    bucket.put("elsewhere/other.safetensors", expert(house, value=2))
    bucket.put("one/readme.txt", b"hello")
    await mirror.sync()
    assert names(house) == ["cron"]
    assert (await house.chat(CRON[2], model="auto")).headers["x-switchyard-mix"] == "cron=1"
    first = house.registry.get("cron").digest
    bucket.put("one/cron.safetensors", expert(house, value=3))
    await mirror.sync()
    assert [version.digest for version in house.registry.get("cron").versions][1:] == [first]
    await mirror.sync()
    assert len(house.registry.get("cron").versions) == 2, "nothing has changed since"
    bucket.delete("one/cron.safetensors")
    await mirror.sync()
    assert names(house) == []
    assert house.quarantined == []


async def test_one_file_of_a_repository(house: House, repository: Repository) -> None:
    repository.files["a.safetensors"] = expert(house, value=1, name="named")
    repository.files["b.safetensors"] = expert(house, value=2)
    mirror = mirror_of(house, "hf://org/repo/a.safetensors")
    await mirror.sync()
    assert names(house) == ["named"]
    repository.files["a.safetensors"] = expert(house, value=3, name="named")
    await mirror.sync()
    assert len(house.registry.get("named").versions) == 2
    await mirror_of(house, "hf://org/repo").sync()
    assert names(house) == ["b", "named"]
    repository.tagged["old.safetensors"] = expert(house, value=4)
    await mirror_of(house, "hf://org/repo@v1").sync()
    assert "old" in names(house)
    await house.http.delete("/v1/experts/old")
    with pytest.raises((NotFoundError, StoreUnavailableError)):
        await mirror_of(house, "hf://org/private").sync()
    repository.close()
    with pytest.raises(StoreUnavailableError):
        await mirror_of(house, "hf://org/repo").sync()
    assert names(house) == ["b", "named"], "what cannot be read has lost nothing"


async def test_hostile_and_large_files(house: House, memory: Any, caplog: pytest.LogCaptureFixture) -> None:
    memory.pipe_file("/x/junk.safetensors", b"junk")
    memory.pipe_file("/x/large.safetensors", bytes(2 << 20))
    memory.pipe_file("/x/good.safetensors", expert(house, value=1))
    memory.pipe_file("/x/prompts.safetensors", expert(house, value=2))
    memory.pipe_file("/x/prompts.jsonl", b"x" * (2 << 20))
    memory.pipe_file("/x/signed.safetensors", expert(house, value=3))
    memory.pipe_file("/x/signed.safetensors.sig", b"nonsense")
    mirror = mirror_of(house, "memory://x")
    for _ in range(3):
        await mirror.sync()
    assert names(house) == ["good"]
    for name in ("junk", "large", "prompts", "signed"):
        assert caplog.text.count(f"{name}.safetensors of memory:///x is not served") == 1
    assert house.quarantined == []


async def test_a_file_that_changes_while_it_is_read(house: House, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe_file("/x/a.safetensors", expert(house, value=1))
    mirror, other = mirror_of(house, "memory://x"), expert(house, value=2)
    folder = mirror._source._folder  # type: ignore[attr-defined]
    real = folder.download

    def meddle(*given: Any, **options: Any) -> Any:
        received = real(*given, **options)
        memory.pipe_file("/x/a.safetensors", other)
        return received

    with monkeypatch.context() as patched:
        patched.setattr(folder, "download", meddle)
        with pytest.raises(StoreUnavailableError, match="changed while"):
            await mirror.sync()
    assert house.quarantined == []
    await mirror.sync()
    assert names(house) == ["a"]


async def test_a_download_is_given_up_when_the_server_stops(
    house: House, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe_file("/x/a.safetensors", bytes(5 << 20))
    mirror = mirror_of(house, "memory://x", max_bytes=1 << 30)
    folder = mirror._source._folder  # type: ignore[attr-defined]
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    class Slow:
        size = 1 << 30
        pieces = 0

        def __enter__(self) -> Slow:
            return self

        def __exit__(self, *_: object) -> None:
            ended.set()

        def read(self, size: int) -> bytes:
            self.pieces += 1
            begun.set()
            assert go_on.wait(30)
            return bytes(size)

    slow = Slow()
    monkeypatch.setattr(folder._files, "open", lambda *_, **__: slow)
    syncing = asyncio.create_task(mirror.sync())
    await asyncio.to_thread(begun.wait, 30)
    syncing.cancel()
    await asyncio.gather(syncing, return_exceptions=True)
    go_on.set()
    assert await asyncio.to_thread(ended.wait, 30)
    assert slow.pieces == 1
    async with asyncio.timeout(30):
        while house.quarantined:
            await asyncio.sleep(0.01)


async def test_a_server_mirrors_what_it_is_told_to_and_allowed(tmp_path: Path, bucket: Bucket) -> None:
    data = make_expert(tmp_path / "made", value=1).read_bytes()
    bucket.put("two/a.safetensors", data)
    digest = digest_of(tmp_path / "made")
    bucket.put("two/a.safetensors.sig", ADA.sign(digest).encode())
    signing = {"trusted_keys": ADA.line, "require_signature": True}
    async with open_house(tmp_path, sources="s3://bucket/two", hub_allow="s3://bucket", **signing) as house:
        async with asyncio.timeout(60):
            while names(house) != ["a"]:
                await asyncio.sleep(0.01)
        assert (await house.http.get("/v1/experts/a")).json()["signed_by"]["name"] == "ada@example.org"
    for sources, allowed in (
        ("s3://bucket/two", ""),
        ("s3://bucket/two", "s3://bucket/one,hf://org"),
        ("s3://bucket-2/two", "s3://bucket"),
        ("https://example.org/x", "https://example.org"),
    ):
        with pytest.raises(InvalidRequestError):
            async with open_house(tmp_path, sources=sources, hub_allow=allowed):
                pass


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with live_server(tmp_path_factory.mktemp("server")) as url:
        yield url


def run(*arguments: str) -> int:
    try:
        main(list(arguments))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_pull(server: str, bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = make_expert(tmp_path / "one", value=11)
    bucket.put("three/one.safetensors", one.read_bytes())
    bucket.put("three/one.jsonl", lines(CRON))
    bucket.put("three/one.safetensors.sig", ADA.sign(digest_of(one)).encode())
    bucket.put("three/two.safetensors", make_expert(tmp_path / "two", value=12, name="named").read_bytes())
    bucket.put("four/junk.safetensors", b"junk")
    bucket.put("four/readme", b"")
    allow = ("--server", server, "--allow", "s3://bucket/three,s3://bucket/four")
    assert run("pull", "s3://bucket/three", *allow) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "one is live" in said
    assert "named is live" in said
    client = Client(server)
    found = {found["id"]: found for found in client.experts()}
    assert found["one"]["exemplar_count"] == len(CRON)
    assert found["one"]["signed_by"]["name"] is None
    assert found["one"]["digest"] == digest_of(one)
    assert run("pull", "s3://bucket/three/one.safetensors", "--name", "uno", *allow) == 0
    assert "uno" in {found["id"] for found in client.experts()}
    capsys.readouterr()
    for arguments, part in (
        (("s3://bucket/three", "--name", "x", *allow), "2 experts: one name is not enough"),
        (("s3://bucket/other", *allow), "may not be read"),
        (("s3://bucket/three", "--server", server), "may not be read"),
        (("s3://bucket/four", *allow), "junk"),
        (("s3://bucket/four/readme", *allow), "there is no expert file"),
        (("s3://bucket/three/none", *allow), "there is nothing at"),
        (("https://example.org/x.safetensors", *allow), "is no address"),
        (("s3://bucket/three", "--max-size", "10B", *allow), "at most 10 are taken"),
    ):
        assert run("pull", *arguments) == 1, arguments
        assert part in " ".join(capsys.readouterr().err.split()), arguments
