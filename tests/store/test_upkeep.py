from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from store.backends.disk import DiskStore
from store.backends.redis import RedisStore
from store.backends.redis_link import chunk_key
from store.errors import ConflictError, ExpertUnavailableError
from store.expert_file import digest_of
from store.garbage import collect, used_in
from store.registry import Registry
from store.upkeep import Finding, Verdict, migrate, verify
from tests.store.builders import base_manifest, write_sample
from tests.store.redis_server import RedisServer


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[DiskStore]:
    store = DiskStore(tmp_path / "store")
    yield store
    store.close()


@pytest.fixture
def shared(shared_redis: RedisServer, tmp_path: Path) -> Iterator[RedisStore]:
    store = RedisStore(shared_redis.url, tmp_path / "cache", cache_bytes=1 << 30)
    yield store
    store.close()


def publish(store: DiskStore | RedisStore, name: str, seed: int = 0) -> str:
    registry = Registry(store, base_manifest(), frozenset())
    path = write_sample(store.quarantine() / "upload", seed)
    return registry.publish(path, name=name, exemplars=[f"about {name}"])[0].digest


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def test_every_kind_of_fault_is_found(disk: DiskStore, tmp_path: Path) -> None:
    assert list(verify(disk)) == []
    publish(disk, "sound")
    flip(disk.fetch(publish(disk, "flipped", 1)))
    disk.fetch(publish(disk, "gone", 2)).unlink()
    orphan = write_sample(disk.quarantine() / "orphan", 3)
    idle = digest_of(orphan)
    disk.put_blob(orphan, idle)
    found = [Finding("flipped", Verdict.DAMAGED), Finding("gone", Verdict.GONE), Finding("sound", Verdict.SOUND)]
    assert list(verify(disk)) == [*found, Finding(idle, Verdict.IDLE)]
    assert list(verify(disk, repair=True)) == [*found, Finding(idle, Verdict.IDLE)], "its grace period is not ours"
    collect(disk, lambda: used_in(disk), 0)
    assert list(verify(disk)) == found
    (tmp_path / "store" / "records" / "gone.json").write_text("{")
    again = DiskStore(tmp_path / "store")
    assert Finding("gone", Verdict.UNREADABLE) in list(verify(again, repair=True))
    again.close()
    assert [verdict for verdict in Verdict if not verdict.is_fault] == [
        Verdict.SOUND, Verdict.HEALED, Verdict.IDLE,
    ]  # fmt: skip


def test_redis_is_healed_from_a_cache(shared: RedisStore, shared_redis: RedisServer) -> None:
    digest = publish(shared, "a")
    shared_redis.client.setrange(chunk_key(digest, 0), 100, b"xx")
    assert list(verify(shared)) == [Finding("a", Verdict.DAMAGED)]
    assert list(verify(shared, repair=True)) == [Finding("a", Verdict.HEALED)]
    assert list(verify(shared)) == [Finding("a", Verdict.SOUND)]


def test_migration_goes_on_where_it_was_interrupted(disk: DiskStore, shared: RedisStore) -> None:
    for seed, name in enumerate("abc"):
        publish(disk, name, seed)
    steps = migrate(disk, shared)
    assert next(steps) == ("a", True)
    steps.close()
    assert list(migrate(disk, shared)) == [("a", False), ("b", True), ("c", True)]
    assert list(migrate(disk, shared)) == [("a", False), ("b", False), ("c", False)]
    assert shared.records() == disk.records()
    assert shared.blobs() == disk.blobs()
    assert [finding.verdict for finding in verify(shared)] == [Verdict.SOUND] * 3
    assert list(migrate(shared, disk)) == [("a", False), ("b", False), ("c", False)]


def test_migration_carries_no_damage_and_takes_no_name(disk: DiskStore, shared: RedisStore) -> None:
    publish(shared, "a", 1)
    other = publish(disk, "a", 0)
    with pytest.raises(ConflictError, match="another expert named a"):
        list(migrate(disk, shared))
    assert other not in shared.blobs()
    Registry(shared, base_manifest(), frozenset()).remove("a")
    flip(disk.fetch(other))
    with pytest.raises(ExpertUnavailableError, match="damaged"):
        list(migrate(disk, shared))
    assert shared.records() == {}
