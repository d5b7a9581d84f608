"""What no record names is kept for a while, then removed; what one names, or is about to, never."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from store.backends import ABSENT, BlobStore
from store.backends.disk import DiskStore
from store.backends.redis import RedisStore
from store.errors import ConflictError, StoreError
from store.expert_file import digest_of
from store.garbage import collect, used_in
from store.registry import Registry
from tests.store.builders import base_manifest, write_sample
from tests.store.conftest import Opener


@pytest.fixture
def registry(store: BlobStore) -> Registry:
    return Registry(store, base_manifest(), frozenset())


def publish(store: BlobStore, registry: Registry, name: str, seed: int = 0, *, replace: bool = False) -> str:
    path = write_sample(store.quarantine() / f"upload-{name}-{seed}", seed)
    return registry.publish(path, name=name, replace=replace)[0].digest


def age(store: BlobStore, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the store's notes be older."""
    real = store.idle()
    monkeypatch.setattr(store, "idle", lambda: {digest: known + seconds for digest, known in real.items()})


def test_a_grace_period(store: BlobStore, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, digest = publish(store, registry, "kept"), publish(store, registry, "a", 1)
    registry.remove("a")
    assert store.idle().keys() == {digest}, "it is noted at once"
    [idle] = registry.collect_garbage(100)
    assert (idle.digest, idle.is_due, idle.bytes) == (digest, False, store.blob_bytes(digest))
    assert idle.seconds < 50
    age(store, 99, monkeypatch)
    assert [one.is_due for one in registry.collect_garbage(100.5)] == [False]
    assert store.blobs() == {kept, digest}
    age(store, 2, monkeypatch)
    assert [one.is_due for one in registry.collect_garbage(100.5)] == [True]
    assert store.blobs() == {kept}
    monkeypatch.undo()
    assert store.idle() == {}
    assert registry.collect_garbage(0) == []


def test_the_period_begins_anew_whenever_a_blob_is_left(
    store: BlobStore, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = publish(store, registry, "a")
    registry.remove("a")
    age(store, 1000, monkeypatch)
    publish(store, registry, "a")
    assert registry.collect_garbage(100) == []
    monkeypatch.undo()
    assert store.idle() == {}, "a note that is wrong is taken back"
    registry.remove("a")
    assert store.idle()[digest] < 100
    registry.collect_garbage(100)
    assert store.blobs() == {digest}


def test_a_blob_that_is_left_anew_between_looking_and_deleting_stays(
    store: BlobStore, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = publish(store, registry, "a")
    registry.remove("a")
    real, looks = store.idle(), 0

    def idle() -> dict[str, float]:
        """Old when it is looked at first, and new again afterwards."""
        nonlocal looks
        looks += 1
        return {one: known + (1000 if looks <= 2 else 0) for one, known in real.items()}

    monkeypatch.setattr(store, "idle", idle)
    assert [one.is_due for one in registry.collect_garbage(100)] == [True]
    assert looks == 3
    assert store.blobs() == {digest}


def test_all_ways_of_leaving_a_blob(store: BlobStore, registry: Registry) -> None:
    replaced = [publish(store, registry, "a", seed, replace=True) for seed in range(10)]
    assert store.idle().keys() == {replaced[0]}, "the one version too many"
    record = registry.get("a")
    registry.undo(record)
    assert store.idle().keys() == {replaced[0], replaced[-1]}
    orphan = write_sample(store.quarantine() / "orphan", 20)
    store.put_blob(orphan, lost := digest_of(orphan))
    assert lost not in store.idle(), "its maker was killed"
    assert lost in {one.digest for one in registry.collect_garbage(100)}
    assert lost in store.idle()
    registry.collect_garbage(0)
    assert store.blobs() == registry.get("a").blobs


def test_a_dry_run_changes_nothing(store: BlobStore, registry: Registry) -> None:
    orphan = write_sample(store.quarantine() / "orphan")
    store.put_blob(orphan, digest := digest_of(orphan))
    [idle] = collect(store, lambda: used_in(store), 0, dry_run=True)
    assert (idle.digest, idle.is_due) == (digest, True)
    assert store.blobs() == {digest}
    assert store.idle() == {}


def test_a_damaged_record_keeps_everything(store: BlobStore, registry: Registry) -> None:
    publish(store, registry, "a")
    registry.remove("a")
    store.put_record("broken", b"{", expected=ABSENT)
    assert registry.collect_garbage(0) == []
    assert collect(store, lambda: used_in(store), 0) == []
    assert len(store.blobs()) == 1


def test_what_another_process_is_about_to_name_stays(store: BlobStore, opener: Opener) -> None:
    """Two processes on one store: one publishes and removes the same blob, one collects without any grace."""
    registry, elsewhere = Registry(store, base_manifest(), frozenset()), opener()
    other = Registry(elsewhere, base_manifest(), frozenset())
    failures: list[BaseException] = []
    done = threading.Event()

    def sweep() -> None:
        try:
            while not done.is_set():
                other.collect_garbage(0)
        except BaseException as error:
            failures.append(error)

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    try:
        for turn in range(25):
            digest = publish(store, registry, "a", turn % 2)
            assert digest_of(registry.expert_path(registry.get("a").digest)) == digest
            assert digest in elsewhere.blobs()
            registry.remove("a")
    finally:
        done.set()
        sweeper.join()
    assert failures == []


def test_a_collector_whose_view_is_old_asks_first(
    store: BlobStore, opener: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record that another process published counts, also where no message of it has come."""
    monkeypatch.setattr(RedisStore, "_listen", lambda self: None)  # deaf
    collector = Registry(opener(), base_manifest(), frozenset())
    digest = publish(store, Registry(store, base_manifest(), frozenset()), "a")
    collector.collect_garbage(0)
    assert store.blobs() == {digest}


def test_a_publication_that_fails_leaves_an_idle_blob_in_its_grace_period(
    store: BlobStore, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = publish(store, registry, "a")
    registry.remove("a")
    with monkeypatch.context() as patched:

        def full(path: Path, digest: str) -> None:
            raise StoreError("full")

        patched.setattr(store, "put_blob", full)
        with pytest.raises(StoreError, match="full"):
            publish(store, registry, "a")
    assert store.blobs() == {digest}, "somebody may run on it"
    publish(store, registry, "a")
    with pytest.raises(ConflictError):
        publish(store, registry, "a", 1)
    registry.collect_garbage(0)
    assert store.blobs() == {digest}


def test_notes_that_cannot_be_read_count_as_none(tmp_path: Path) -> None:
    disk = DiskStore(tmp_path / "store")
    registry = Registry(disk, base_manifest(), frozenset())
    digest = publish(disk, registry, "a")
    registry.remove("a")
    for text in ("", "{", "[]", '{"x": "y"}'):
        (tmp_path / "store" / "idle.json").write_text(text)
        registry.collect_garbage(100)
        assert disk.blobs() == {digest}
        assert disk.idle().keys() == {digest}
    disk.close()
