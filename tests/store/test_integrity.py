"""A flipped bit, wherever an expert's file is: noticed before anybody gets it, counted, healed from another tier."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from store.backends import BlobStore, Health
from store.backends.disk import DiskStore
from store.backends.redis import RedisStore
from store.backends.redis_link import DAMAGED, chunk_key
from store.errors import ExpertDamagedError
from store.registry import Registry
from store.tiers import Tier, TierStats
from store.upkeep import Finding, Verdict, verify
from tests.store.builders import base_manifest, write_sample
from tests.store.redis_server import RedisServer
from tests.store.test_redis import eventually

Open = Callable[[str], RedisStore]


@pytest.fixture
def open_redis(shared_redis: RedisServer, tmp_path: Path) -> Iterator[Open]:
    opened: list[RedisStore] = []

    def begin(cache: str) -> RedisStore:
        opened.append(RedisStore(shared_redis.url, tmp_path / cache, cache_bytes=1 << 30))
        return opened[-1]

    yield begin
    for store in opened:
        store.close()


def publish(store: BlobStore) -> str:
    path = write_sample(store.quarantine() / "upload")
    return Registry(store, base_manifest(), frozenset()).publish(path, name="expert")[0].digest


def flip_file(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[300] ^= 16
    path.chmod(0o644)
    path.write_bytes(data)


def flip_in_redis(server: RedisServer, digest: str) -> None:
    byte = server.client.getrange(chunk_key(digest, 0), 300, 300)[0]
    server.client.setrange(chunk_key(digest, 0), 300, bytes([byte ^ 16]))


def tier(store: BlobStore, which: Tier) -> TierStats:
    return next(stats for stats in store.tiers() if stats.tier is which)


def is_sound(store: BlobStore, digest: str) -> bool:
    return hashlib.sha256(store.read(digest)).hexdigest() == digest


def test_a_stored_blob(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = DiskStore(tmp_path)
    digest = publish(store)
    assert is_sound(store, digest)
    flip_file(store.fetch(digest))
    with pytest.raises(ExpertDamagedError, match="upload the expert again"):
        store.read(digest)
    with pytest.raises(ExpertDamagedError):
        store.fetch(digest)
    assert tier(store, Tier.STORE).faults == 2
    assert (caplog.records[-1].levelno, "integrity" in caplog.text) == (logging.ERROR, True)
    assert list(verify(store)) == [Finding("expert", Verdict.DAMAGED)]
    publish(store)
    assert is_sound(store, digest), "uploading it again heals it"
    store.close()


def test_a_file_of_the_disk_cache(open_redis: Open, caplog: pytest.LogCaptureFixture) -> None:
    store = open_redis("cache")
    digest = publish(store)
    flip_file(store.fetch(digest))
    assert list(verify(store)) == [Finding("expert", Verdict.DAMAGED)]
    assert list(verify(store, repair=True)) == [Finding("expert", Verdict.HEALED)]
    assert list(verify(store)) == [Finding("expert", Verdict.SOUND)]
    caplog.clear()
    flip_file(store.fetch(digest))
    before = tier(store, Tier.CACHE)
    assert is_sound(store, digest)
    after = tier(store, Tier.CACHE)
    assert (after.faults - before.faults, after.healed - before.healed) == (1, 1)
    assert "made anew from the tier `store`" in caplog.text
    assert tier(store, Tier.STORE).faults == 0


def test_a_chunk_in_redis_is_put_back_by_whoever_has_a_copy(
    open_redis: Open, shared_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    holder, reader = open_redis("holder"), open_redis("reader")
    digest = publish(holder)
    flip_in_redis(shared_redis, digest)
    assert is_sound(holder, digest), "who has a copy does not even ask"
    with pytest.raises(ExpertDamagedError, match="puts it back"):
        reader.read(digest)
    assert not list(reader.quarantine().glob("fetch-*"))
    eventually(lambda: not shared_redis.client.sismember(DAMAGED, digest))
    assert is_sound(reader, digest)
    assert tier(reader, Tier.STORE).faults == 1
    assert tier(holder, Tier.STORE).healed == 1
    assert "made anew from the tier `cache`" in caplog.text
    assert holder.verify(digest, repair=False) is Health.SOUND


def test_what_was_deleted_is_not_put_back(open_redis: Open, shared_redis: RedisServer) -> None:
    holder, reader = open_redis("holder"), open_redis("reader")
    digest = publish(holder)
    flip_in_redis(shared_redis, digest)
    with holder.exclusive():  # nobody heals meanwhile
        with pytest.raises(ExpertDamagedError):
            reader.read(digest)
        holder.delete_blob(digest)
    assert shared_redis.client.smembers(DAMAGED) == set()
    eventually(lambda: holder.blobs() == set())


def test_both_copies(open_redis: Open, shared_redis: RedisServer) -> None:
    store = open_redis("cache")
    digest = publish(store)
    flip_file(store.fetch(digest))
    flip_in_redis(shared_redis, digest)
    assert list(verify(store, repair=True)) == [Finding("expert", Verdict.DAMAGED)]
    with pytest.raises(ExpertDamagedError):
        store.read(digest)
    publish(store)
    eventually(lambda: not shared_redis.client.smembers(DAMAGED))
    assert is_sound(store, digest)
    assert is_sound(open_redis("other"), digest)


def test_tiers_count_what_happens(open_redis: Open) -> None:
    writer, reader = open_redis("writer"), open_redis("reader")
    digest = publish(writer)
    size = len(reader.read(digest))
    reader.read(digest)
    cache, store = tier(reader, Tier.CACHE), tier(reader, Tier.STORE)
    assert (cache.used_bytes, cache.experts, cache.limit_bytes) == (size, 1, 1 << 30)
    assert (cache.loads, cache.hits, cache.misses, store.loads) == (1, 1, 1, 1)
    assert cache.load_seconds == store.load_seconds > 0
