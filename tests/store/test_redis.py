"""What only Redis can do to a store: go away, hang, fill up, forget, or be changed by others."""

from __future__ import annotations

import errno
import math
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from store.backends import ANYTHING, Health
from store.backends.opening import open_store
from store.backends.redis import RedisStore
from store.backends.redis_link import (
    BLOBS,
    CHANGES,
    DAMAGED,
    EDITION,
    HISTORY,
    LEASE,
    RECORDS,
    REMEMBERED,
    chunk_key,
)
from store.errors import (
    ExpertUnavailableError,
    InvalidRequestError,
    StorageFullError,
    StoreError,
    StoreUnavailableError,
)
from store.expert_file import digest_of
from store.registry import Registry
from tests.store.builders import base_manifest, write_sample
from tests.store.redis_server import RedisServer

Open = Callable[..., RedisStore]


@pytest.fixture
def open_redis(tmp_path: Path) -> Iterator[Open]:
    """Opens a store with a disk cache of its own; everything is closed after the test."""
    opened: list[RedisStore] = []

    def begin(server: RedisServer, *, cache_bytes: int = 1 << 30, lease_seconds: float = 10.0) -> RedisStore:
        cache = tmp_path / f"cache-{len(opened)}"
        store = RedisStore(server.url, cache, cache_bytes=cache_bytes, timeout=0.5, lease_seconds=lease_seconds)
        opened.append(store)
        return store

    yield begin
    for store in opened:
        store.close()


def registry_of(store: RedisStore) -> Registry:
    return Registry(store, base_manifest(), frozenset())


def publish(registry: Registry, store: RedisStore, name: str, seed: int = 0) -> str:
    path = write_sample(store.quarantine() / f"upload-{name}", seed)
    return registry.publish(path, name=name)[0].digest


def eventually(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_large_blobs_are_cut_into_chunks(
    shared_redis: RedisServer, open_redis: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("store.backends.redis_blobs._CHUNK", 100)
    store, other = open_redis(shared_redis), open_redis(shared_redis)
    digest = publish(registry_of(store), store, "a")
    size = store.fetch(digest).stat().st_size
    assert size > 300
    lengths = [shared_redis.client.strlen(chunk_key(digest, i)) for i in range(-(-size // 100) + 1)]
    assert lengths == [100] * (size // 100) + [size % 100, 0]
    assert digest_of(other.fetch(digest)) == digest


@pytest.mark.parametrize("harm", ["flip", "truncate", "lose"])
def test_damage_in_redis_is_noticed_and_healed_from_a_cache(
    shared_redis: RedisServer, open_redis: Open, harm: str
) -> None:
    holder = open_redis(shared_redis)
    holder._heal_at = math.inf  # else it may be faster than this test
    digest = publish(registry_of(holder), holder, "a")
    key = chunk_key(digest, 0)
    if harm == "flip":
        byte = shared_redis.client.getrange(key, 200, 200)[0]
        shared_redis.client.setrange(key, 200, bytes([byte ^ 1]))
    elif harm == "truncate":
        shared_redis.client.set(key, shared_redis.client.get(key)[:-1])
    else:
        shared_redis.client.delete(key)
    reader = open_redis(shared_redis)
    with pytest.raises(ExpertUnavailableError, match="damaged"):
        reader.fetch(digest)
    assert list(reader.quarantine().glob("fetch-*")) == []
    assert reader.verify(digest, repair=True) is Health.DAMAGED, "it has no copy to heal it from"
    assert holder.verify(digest, repair=False) is Health.DAMAGED
    assert holder.verify(digest, repair=True) is Health.HEALED
    assert digest_of(reader.fetch(digest)) == digest
    assert holder.verify(digest, repair=True) is Health.SOUND


def test_damage_in_the_cache_is_noticed_and_healed_from_redis(shared_redis: RedisServer, open_redis: Open) -> None:
    store = open_redis(shared_redis)
    digest = publish(registry_of(store), store, "a")
    path = store.fetch(digest)
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    assert digest_of(store.fetch(digest)) == digest


def test_the_cache_is_bounded(shared_redis: RedisServer, open_redis: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("store.backends.blob_cache._OPENING_SECONDS", -1.0)
    writer = open_redis(shared_redis)
    digests = [publish(registry_of(writer), writer, f"e{i}", seed=i) for i in range(6)]
    size = max(writer.fetch(digest).stat().st_size for digest in digests)
    store = open_redis(shared_redis, cache_bytes=3 * size)
    for digest in [*digests, *reversed(digests)]:
        assert digest_of(store.fetch(digest)) == digest
        assert store._cache.used <= 3 * size
    assert store._cache.get(digests[-1]) is None, "the least recently used went first"


def test_an_outage_stops_only_what_is_not_here(own_redis: RedisServer, open_redis: Open) -> None:
    store, elsewhere = open_redis(own_redis), open_redis(own_redis)
    registry, other = registry_of(store), registry_of(elsewhere)
    local = publish(registry, store, "local")
    remote = publish(other, elsewhere, "remote", seed=1)
    eventually(lambda: len(registry.list()) == 2)
    own_redis.kill()
    assert [record.name for record in registry.list()] == ["local", "remote"]
    assert digest_of(registry.expert_path(registry.get("local").digest)) == local
    with pytest.raises(ExpertUnavailableError, match="not on this machine"):
        registry.expert_path(remote)
    with pytest.raises(StoreUnavailableError, match="cannot be reached"):
        publish(registry, store, "new", seed=2)
    with pytest.raises(StoreUnavailableError):
        registry.remove("local")
    own_redis.start()
    assert digest_of(registry.expert_path(remote)) == remote
    publish(registry, store, "new", seed=2)
    eventually(lambda: [record.name for record in other.list()] == ["local", "new", "remote"])


def test_a_redis_that_hangs_is_not_waited_for(own_redis: RedisServer, open_redis: Open) -> None:
    store = open_redis(own_redis)
    registry = registry_of(store)
    digest = publish(registry, store, "a")
    own_redis.pause()
    assert digest_of(registry.expert_path(registry.get("a").digest)) == digest
    with pytest.raises(StoreUnavailableError):
        publish(registry, store, "b", seed=1)
    own_redis.resume()
    eventually(lambda: _tries(lambda: publish(registry, store, "b", seed=1)))
    assert [record.name for record in registry.list()] == ["a", "b"]


def test_a_crowd_is_refused_in_the_time_of_one(own_redis: RedisServer, open_redis: Open) -> None:
    store = open_redis(own_redis)
    own_redis.pause()
    refused = []

    def put(name: str) -> None:
        with pytest.raises(StoreUnavailableError, match="cannot be reached"):
            store.put_record(name, b"1", expected=ANYTHING)
        refused.append(name)

    # One after the other, each waiting for an answer as if it were the first, they would take minutes.
    crowd = [threading.Thread(target=put, args=(f"a-{i}",), daemon=True) for i in range(150)]
    for one in crowd:
        one.start()
    eventually(lambda: len(refused) == len(crowd))
    own_redis.resume()
    eventually(lambda: _tries(lambda: store.put_record("a", b"1", expected=ANYTHING)))
    assert store.records() == {"a": b"1"}


def test_a_lease_that_redis_hung_with_is_handed_back(own_redis: RedisServer, open_redis: Open) -> None:
    store = open_redis(own_redis, lease_seconds=600)
    with store.exclusive():
        own_redis.pause()
        with pytest.raises(StoreUnavailableError):
            store.put_record("a", b"1", expected=ANYTHING)
    with pytest.raises(StoreUnavailableError):
        store.put_record("b", b"1", expected=ANYTHING)
    own_redis.resume()
    done = threading.Event()

    def put() -> None:
        eventually(lambda: _tries(lambda: store.put_record("c", b"1", expected=ANYTHING)))
        done.set()

    threading.Thread(target=put, daemon=True).start()
    assert done.wait(60)


def test_a_full_redis_takes_nothing_and_loses_nothing(own_redis: RedisServer, open_redis: Open) -> None:
    store = open_redis(own_redis)
    registry = registry_of(store)
    publish(registry, store, "a")
    own_redis.client.config_set("maxmemory", 1)
    with pytest.raises(StorageFullError, match="maxmemory"):
        publish(registry, store, "b", seed=1)
    assert [record.name for record in registry.list()] == ["a"]
    registry.remove("a")
    registry.collect_garbage(0)
    assert store.blobs() == set(), "making room is possible"
    own_redis.client.config_set("maxmemory", 0)
    publish(registry, store, "b", seed=1)
    assert store.blobs() == {record.digest for record in registry.list()}


def test_a_redis_that_lost_everything_gets_back_what_is_here(own_redis: RedisServer, open_redis: Open) -> None:
    store, elsewhere = open_redis(own_redis), open_redis(own_redis)
    registry, other = registry_of(store), registry_of(elsewhere)
    publish(registry, store, "mine")
    remote = publish(other, elsewhere, "theirs", seed=1)
    eventually(lambda: len(registry.list()) == 2)
    before = registry.list()
    elsewhere.close()
    own_redis.restart_empty()
    eventually(lambda: store.lost().keys() == {"mine", "theirs"})
    assert registry.list() == before, "nobody is told that it does not exist while it may come back"
    registry.restore_lost()
    assert [record.name for record in registry.list()] == ["mine"], "the other one's bytes were nowhere"
    assert store.lost() == {}
    fresh = open_redis(own_redis)
    assert [record.name for record in registry_of(fresh).list()] == ["mine"]
    assert digest_of(fresh.fetch(before[0].digest)) == before[0].digest
    with pytest.raises(ExpertUnavailableError):
        fresh.fetch(remote)


def test_what_is_put_back_is_found_all_the_while(
    own_redis: RedisServer, open_redis: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_redis(own_redis)
    registry = registry_of(store)
    publish(registry, store, "mine")
    own_redis.restart_empty()
    eventually(lambda: store.lost().keys() == {"mine"})
    store._closing.set()  # nobody else refreshes in between
    store._listener.join()
    seen: list[set[str]] = []
    read = store._mirror.refresh

    def refresh() -> None:
        seen.append(set(store.records()))
        read()
        seen.append(set(store.records()))

    monkeypatch.setattr(store._mirror, "refresh", refresh)
    registry.restore_lost()
    assert store.lost() == {}
    assert seen
    assert all(names == {"mine"} for names in seen)


@pytest.mark.parametrize("others", [0, 1, 2])
def test_a_redis_that_came_back_from_an_older_copy_gets_back_what_is_here(
    shared_redis: RedisServer, open_redis: Open, others: int
) -> None:
    """Its edition is lower, the same or higher by the time that anybody looks: others have made changes since."""
    store, elsewhere = open_redis(shared_redis), open_redis(shared_redis)
    registry, other = registry_of(store), registry_of(elsewhere)
    publish(registry, store, "old")
    copy = shared_redis.copy()
    digest = publish(registry, store, "late", seed=1)
    eventually(lambda: len(other.list()) == 2)
    with store._mirror._refreshing, elsewhere._mirror._refreshing:  # they see nothing meanwhile
        shared_redis.go_back(copy)
        third = open_redis(shared_redis)
        for i in range(others):
            publish(registry_of(third), third, f"new-{i}", seed=2 + i)
    names = ["late", *(f"new-{i}" for i in range(others)), "old"]
    for one in (store, elsewhere):
        eventually(lambda one=one: one.lost().keys() == {"late"})
        eventually(lambda one=one: list(one.records()) == names)
    registry.restore_lost()
    for one in (store, elsewhere, third):
        eventually(lambda one=one: list(one.records()) == names and not one.lost())
    assert digest_of(third.fetch(digest)) == digest
    other.remove("late")
    eventually(lambda: "late" not in store.records())
    assert store.lost() == {}, "what somebody removed is not lost"


def test_changes_by_servers_of_an_earlier_version_are_read(shared_redis: RedisServer, open_redis: Open) -> None:
    """They leave no words in the history."""
    client = shared_redis.client

    def change(name: str, data: bytes | None) -> None:
        with client.pipeline(transaction=True) as pipeline:
            if data is None:
                pipeline.hdel(RECORDS, name)
            else:
                pipeline.hset(RECORDS, name, data)
            pipeline.zadd(CHANGES, {name: int(client.get(EDITION) or 0) + 1})
            pipeline.incr(EDITION)
            pipeline.execute()

    change("a", b"1")
    store = open_redis(shared_redis)
    assert store.records() == {"a": b"1"}
    change("b", b"2")
    eventually(lambda: store.records() == {"a": b"1", "b": b"2"})
    store.put_record("c", b"3", expected=ANYTHING)
    change("a", None)
    change("c", b"4")
    eventually(lambda: store.records() == {"b": b"2", "c": b"4"})
    store.put_record("d", b"5", expected=ANYTHING)
    assert store.records() == {"b": b"2", "c": b"4", "d": b"5"}
    assert store.lost() == {}


def test_a_reader_that_was_away_for_too_long_to_tell_believes_redis(
    shared_redis: RedisServer, open_redis: Open
) -> None:
    store = open_redis(shared_redis)
    store.put_record("a", b"1", expected=ANYTHING)
    store.put_record("b", b"2", expected=ANYTHING)
    with shared_redis.client.pipeline(transaction=True) as pipeline:
        pipeline.hdel(RECORDS, "a")
        pipeline.incrby(EDITION, REMEMBERED)
        pipeline.delete(HISTORY)
        pipeline.execute()
    eventually(lambda: store.records() == {"b": b"2"})
    assert store.lost() == {}


def test_words_are_kept_of_the_last_changes_only(shared_redis: RedisServer, open_redis: Open) -> None:
    store = open_redis(shared_redis)
    store.put_record("a", b"1", expected=ANYTHING)
    shared_redis.client.incrby(EDITION, REMEMBERED - 1)
    store.put_record("a", b"2", expected=ANYTHING)
    assert shared_redis.client.zrange(HISTORY, 0, -1, withscores=True)[0][1] == REMEMBERED + 1
    shared_redis.client.set(EDITION, 1)
    store.put_record("a", b"3", expected=ANYTHING)
    assert [score for _, score in shared_redis.client.zrange(HISTORY, 0, -1, withscores=True)] == [2]


def test_whatever_breaks_the_listener_it_goes_on(
    shared_redis: RedisServer, open_redis: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, other = open_redis(shared_redis), open_redis(shared_redis)
    broken = threading.Event()

    def fail() -> None:
        monkeypatch.undo()
        broken.set()
        raise RuntimeError("a bug")

    monkeypatch.setattr(store, "_heal_reported", fail)
    assert broken.wait(60)
    other.put_record("a", b"1", expected=ANYTHING)
    eventually(lambda: store.records() == {"a": b"1"})
    assert "a bug" in caplog.text


def test_a_copy_that_vanishes_while_it_heals_another_harms_nobody(
    shared_redis: RedisServer, open_redis: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = open_redis(shared_redis), open_redis(shared_redis)
    digest = publish(registry_of(store), store, "a")
    get = store._cache.get
    gone = threading.Event()

    def evicted(digest: str) -> Path | None:
        path = get(digest)
        assert path is not None
        path.unlink()  # by another process on the same folder
        monkeypatch.undo()
        gone.set()
        return path

    monkeypatch.setattr(store._cache, "get", evicted)
    shared_redis.client.sadd(DAMAGED, digest)
    assert gone.wait(60)
    publish(registry_of(other), other, "b", seed=1)
    eventually(lambda: list(store.records()) == ["a", "b"])
    assert digest_of(store.fetch(digest)) == digest, "Redis still has it"


@pytest.mark.parametrize("refused", ["open", "write"])
def test_a_disk_that_takes_no_more_is_told_and_keeps_nothing(
    shared_redis: RedisServer, open_redis: Open, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    writer = open_redis(shared_redis)
    digest = publish(registry_of(writer), writer, "a")
    store = open_redis(shared_redis)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for read in (store.fetch, store.read):
        if refused == "open":
            monkeypatch.setattr("tempfile.NamedTemporaryFile", full)
        else:  # what is written fails as the file is closed
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
        try:
            with pytest.raises(StorageFullError if refused == "open" else StoreError, match="cannot cache the file"):
                read(digest)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFullError, match="the disk is full"):
        store.fetch(digest)
    monkeypatch.undo()
    assert list(store.quarantine().glob("fetch-*")) == []
    assert digest_of(store.fetch(digest)) == digest


def test_readers_far_behind_read_everything(
    shared_redis: RedisServer, open_redis: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("store.backends.redis_mirror._NEAR", 3)
    store, other = open_redis(shared_redis), open_redis(shared_redis)
    with other._mirror._refreshing:  # it sees nothing meanwhile
        for i in range(40):
            store.put_record(f"r{i % 8}", b"%d" % i, expected=ANYTHING)
        store.delete_record("r0")
    eventually(lambda: other.records() == {f"r{i}": b"%d" % (32 + i) for i in range(1, 8)})
    assert open_redis(shared_redis).records() == other.records()


def test_a_writer_that_slept_through_its_lease_changes_nothing(shared_redis: RedisServer, open_redis: Open) -> None:
    store = open_redis(shared_redis)
    with store.exclusive():
        shared_redis.client.set(LEASE, "somebody else")
        with pytest.raises(StoreUnavailableError, match="lost"):
            store.put_record("a", b"1", expected=ANYTHING)
        with pytest.raises(StoreUnavailableError, match="lost"):
            store.delete_blob("0" * 64)
        with pytest.raises(StoreUnavailableError, match="lost"):
            store.put_blob(write_sample(store.quarantine() / "e"), "0" * 64)
    assert store.records() == {}
    assert store.blobs() == set()
    assert shared_redis.client.get(LEASE) == b"somebody else"


def test_a_writer_that_slept_between_chunks_calls_no_blob_complete(
    shared_redis: RedisServer, open_redis: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has the lease meanwhile may have collected the chunks that were there."""
    store = open_redis(shared_redis)
    begin = store._blobs._begin

    def slow(**words: object) -> None:
        begin(**words)
        shared_redis.client.set(LEASE, "somebody else")

    monkeypatch.setattr(store._blobs, "_begin", slow)
    path = write_sample(store.quarantine() / "e")
    digest = digest_of(path)
    with pytest.raises(StoreUnavailableError, match="lost"):
        store.put_blob(path, digest)
    assert store.blob_bytes(digest) is None
    assert shared_redis.client.keys("switchyard:blob:*") == []


def test_a_dead_writer_is_waited_for_no_longer_than_its_lease(shared_redis: RedisServer, open_redis: Open) -> None:
    store = open_redis(shared_redis, lease_seconds=0.3)
    shared_redis.client.set(LEASE, "dead", px=300)
    assert store.put_record("a", b"1", expected=ANYTHING)
    shared_redis.client.set(LEASE, "alive")
    with pytest.raises(StoreUnavailableError, match="held by another writer"):
        store.put_record("b", b"1", expected=ANYTHING)
    shared_redis.client.delete(LEASE)


def test_a_long_step_keeps_its_lease(shared_redis: RedisServer, open_redis: Open) -> None:
    store, other = open_redis(shared_redis, lease_seconds=1.0), open_redis(shared_redis, lease_seconds=5)
    order: list[str] = []

    def wait() -> None:
        with other.exclusive():
            order.append("other")

    with store.exclusive():
        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(1.5)
        order.append("first")
        store.put_record("a", b"1", expected=ANYTHING)
    waiting.join()
    assert order == ["first", "other"]


def test_chunks_of_a_killed_upload_are_collected(shared_redis: RedisServer, open_redis: Open) -> None:
    store = open_redis(shared_redis)
    digest = publish(registry_of(store), store, "a")
    shared_redis.client.hset(BLOBS, "f" * 64, "partial 100 3")
    shared_redis.client.set(chunk_key("f" * 64, 1), b"x")
    with pytest.raises(ExpertUnavailableError, match="gone"):
        store.fetch("f" * 64)
    registry_of(store).collect_garbage(0)
    assert store.blobs() == {digest}
    assert shared_redis.client.keys("switchyard:blob:ffff*") == []


def test_addresses(tmp_path: Path, own_redis: RedisServer) -> None:
    for bad in ("redis://host:port/0", "s3://bucket/experts"):
        with pytest.raises(InvalidRequestError) as caught:
            open_store(bad, cache=tmp_path / "c", cache_bytes=1)
        assert caught.value.param == "store"
    own_redis.client.config_set("requirepass", "right")
    with pytest.raises(StoreError, match="name or password") as refused:
        open_store(own_redis.url.replace("//", "//:wrong@"), cache=tmp_path / "c", cache_bytes=1)
    assert "wrong" not in refused.value.message
    own_redis.kill()
    with pytest.raises(StoreUnavailableError, match="cannot be reached"):
        open_store(own_redis.url, cache=tmp_path / "c", cache_bytes=1)


def _tries(what: Callable[[], object]) -> bool:
    try:
        what()
    except StoreUnavailableError:
        return False
    return True
