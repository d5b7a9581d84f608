from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from store.backends import ABSENT, ANYTHING
from store.backends.disk import DiskStore
from store.errors import (
    ConflictError,
    ExpertFileError,
    ExpertUnavailableError,
    InvalidRequestError,
    NotFoundError,
    StoreError,
    WrongBaseError,
)
from store.expert_file import digest_of
from store.registry import Registry
from tests.store.builders import base_manifest, write_sample

RESERVED = frozenset({"auto", "smollm2"})


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DiskStore]:
    store = DiskStore(tmp_path / "store")
    yield store
    store.close()


@pytest.fixture
def registry(store: DiskStore) -> Registry:
    return Registry(store, base_manifest(), RESERVED)


def upload(store: DiskStore, seed: int = 0, **info: object) -> Path:
    return write_sample(store.quarantine() / f"upload-{seed}", seed, **info)


def test_publish_find_remove(store: DiskStore, registry: Registry) -> None:
    path = upload(store, name="cron")
    digest, size = digest_of(path), path.stat().st_size
    record, created = registry.publish(path)
    assert created
    assert not path.exists()
    assert (record.name, record.digest, record.bytes) == ("cron", digest, size)
    assert (record.codec, record.description, record.exemplar_count) == ("t-switch", "a sample", 2)
    assert abs(record.created - time.time()) < 60
    assert registry.get("cron") == record
    assert registry.list() == [record]
    assert digest_of(registry.expert_path(digest)) == digest
    assert registry.exemplars(record) == ["Was ist das?", 'Say "hé"']
    assert registry.remove("cron") == record
    assert registry.list() == []
    assert store.blobs() == set()
    with pytest.raises(ExpertUnavailableError):
        registry.expert_path(digest)


def test_records_survive_a_restart(store: DiskStore, registry: Registry, tmp_path: Path) -> None:
    record, _ = registry.publish(upload(store), name="a", exemplars=["one", "two", "one"])
    store.close()
    again = DiskStore(tmp_path / "store")
    reopened = Registry(again, base_manifest(), RESERVED)
    assert reopened.list() == [record]
    assert reopened.exemplars(record) == ["one", "two"]
    again.close()


def test_names(store: DiskStore, registry: Registry) -> None:
    path = upload(store)
    for bad in ["Auto", "a/b", "../x", ".hidden", "x" * 65, "ä", "a b"]:
        with pytest.raises(InvalidRequestError, match="a name has") as caught:
            registry.publish(path, name=bad)
        assert caught.value.param == "name"
    for taken in RESERVED:
        with pytest.raises(InvalidRequestError, match="reserved"):
            registry.publish(path, name=taken)
    record, _ = registry.publish(path)
    assert record.name == f"expert-{record.digest[:12]}"


def test_publishing_again_is_no_error(store: DiskStore, registry: Registry) -> None:
    first, _ = registry.publish(upload(store), name="a")
    assert registry.publish(upload(store), name="a") == (first, False)
    assert registry.publish(upload(store), name="a", exemplars=registry.exemplars(first)) == (first, False)
    with pytest.raises(ConflictError, match="other exemplars"):
        registry.publish(upload(store), name="a", exemplars=["new"])
    with pytest.raises(ConflictError, match="another expert"):
        registry.publish(upload(store, seed=1), name="a")
    assert registry.list() == [first]


def test_uploaded_exemplars_win_and_leave_with_the_expert(store: DiskStore, registry: Registry) -> None:
    mine = ["line\nbreak", "é 🙂", '"']
    record, _ = registry.publish(upload(store), name="a", exemplars=mine)
    assert record.exemplar_count == 3
    assert registry.exemplars(record) == mine
    assert registry.publish(upload(store), name="a") == (record, False)
    assert store.blobs() == {record.digest, record.exemplars_digest}
    registry.remove("a")
    assert store.blobs() == set()


def test_bytes_stay_while_another_name_needs_them(store: DiskStore, registry: Registry) -> None:
    first, _ = registry.publish(upload(store), name="a", exemplars=["x"])
    second, _ = registry.publish(upload(store), name="b")
    registry.remove("a")
    assert store.blobs() == {second.digest}
    assert first.digest == second.digest
    registry.expert_path(second.digest)


def test_unknown_names_get_a_hint(store: DiskStore, registry: Registry) -> None:
    registry.publish(upload(store), name="numerals")
    with pytest.raises(NotFoundError, match="did you mean numerals"):
        registry.get("numeral")
    for name in ["zzz", "../numerals", "", "x" * 300]:
        with pytest.raises(NotFoundError):
            registry.get(name)
    with pytest.raises(NotFoundError):
        registry.remove("zzz")


def test_bad_files_stay_out(store: DiskStore, registry: Registry) -> None:
    path = upload(store)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ExpertFileError):
        registry.publish(path, name="a")
    with pytest.raises(WrongBaseError):
        Registry(store, base_manifest(seed=1), RESERVED).publish(upload(store), name="a")
    assert registry.list() == []
    assert store.blobs() == set()


def test_damaged_and_missing_bytes_are_noticed_and_healed(store: DiskStore, registry: Registry) -> None:
    record, _ = registry.publish(upload(store), name="a")
    path = registry.expert_path(record.digest)
    path.chmod(0o644)
    path.write_bytes(b"x" + path.read_bytes()[1:])
    with pytest.raises(ExpertUnavailableError, match="damaged"):
        registry.expert_path(record.digest)
    path.unlink()
    with pytest.raises(ExpertUnavailableError, match="gone"):
        registry.exemplars(record)
    assert registry.publish(upload(store), name="a") == (record, False)
    assert digest_of(registry.expert_path(record.digest)) == record.digest


def test_a_damaged_record_hides_no_other(store: DiskStore, registry: Registry, tmp_path: Path) -> None:
    keep, _ = registry.publish(upload(store), name="a")
    registry.publish(upload(store, seed=1), name="b")
    (tmp_path / "store" / "records" / "b.json").write_text('{"name": "b"')
    assert registry.list() == [keep]
    with pytest.raises(NotFoundError):
        registry.get("b")
    Registry(store, base_manifest(), RESERVED)
    assert len(store.blobs()) == 2, "blobs a damaged record may need are kept"
    healed, created = registry.publish(upload(store, seed=1), name="b")
    assert created
    assert registry.list() == [keep, healed]


def test_experts_of_another_base_keep_their_names(store: DiskStore, registry: Registry) -> None:
    registry.publish(upload(store), name="a")
    other = Registry(store, base_manifest(seed=1), RESERVED)
    assert other.list() == []
    with pytest.raises(ExpertUnavailableError, match="another base"):
        other.get("a")
    other.remove("a")
    assert registry.list() == []


def test_another_process_is_seen_at_once(store: DiskStore, registry: Registry, tmp_path: Path) -> None:
    other_store = DiskStore(tmp_path / "store")
    other = Registry(other_store, base_manifest(), RESERVED)
    record, _ = other.publish(upload(other_store), name="a")
    assert registry.get("a") == record
    registry.remove("a")
    assert other.list() == []
    other_store.close()


def test_threads_that_publish_one_name_agree(store: DiskStore, registry: Registry) -> None:
    def publish(seed: int) -> bool:
        path = write_sample(store.quarantine() / f"thread-{seed}", seed % 2)
        try:
            return registry.publish(path, name="a")[1]
        except ConflictError:
            return False

    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(publish, range(16)))
    assert sum(created) == 1
    registry.expert_path(registry.get("a").digest)


def test_compare_and_set(store: DiskStore) -> None:
    assert store.put_record("r", b"1", expected=ABSENT)
    assert not store.put_record("r", b"2", expected=ABSENT)
    assert not store.put_record("r", b"2", expected=b"0")
    assert store.put_record("r", b"2", expected=b"1")
    assert store.put_record("r", b"3", expected=ANYTHING)
    assert store.get_record("r") == b"3"
    assert store.records() == {"r": b"3"}
    assert store.delete_record("r")
    assert not store.delete_record("r")
    assert not store.put_record("r", b"4", expected=b"3")


def test_the_quarantine_of_the_dead_is_emptied_and_of_the_living_kept(store: DiskStore, tmp_path: Path) -> None:
    (store.quarantine() / "upload").write_bytes(b"x")
    dead = tmp_path / "store" / "quarantine" / "dead"
    dead.mkdir()
    (dead / "upload").write_bytes(b"x")
    DiskStore(tmp_path / "store").close()
    assert not dead.exists()
    assert (store.quarantine() / "upload").exists()


def test_garbage_of_a_killed_publish_is_collected(store: DiskStore, registry: Registry) -> None:
    record, _ = registry.publish(upload(store), name="a")
    orphan = upload(store, seed=1)
    store.put_blob(orphan, digest_of(orphan))
    assert len(store.blobs()) == 2
    Registry(store, base_manifest(), RESERVED)
    assert store.blobs() == {record.digest}


@pytest.mark.parametrize(
    ("code", "message"), [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "permission"), (errno.EROFS, "read-only")]
)
@pytest.mark.parametrize("call", [1, 2, 3, 4, 5])
def test_nothing_half_visible_when_the_disk_fails(
    store: DiskStore, registry: Registry, monkeypatch: pytest.MonkeyPatch, code: int, message: str, call: int
) -> None:
    path = upload(store)
    calls = 0
    real = os.fsync

    def failing(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(StoreError, match=message) as caught:
        registry.publish(path, name="a")
    assert str(path.parent) not in caught.value.message
    monkeypatch.undo()
    visible = registry.list()
    assert store.blobs() == set().union(*(record.blobs for record in visible))
    for record in visible:
        registry.expert_path(record.digest)
    again = path if path.exists() else upload(store)
    registry.publish(again, name="a")
    assert [record.name for record in registry.list()] == ["a"]


def test_a_store_that_cannot_be_opened_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="cannot open the store"):
        DiskStore(tmp_path / "file")


def test_readers_meet_whole_experts_while_others_write(store: DiskStore, registry: Registry) -> None:
    stop = threading.Event()

    def write() -> None:
        seed = 0
        while not stop.is_set():
            registry.publish(write_sample(store.quarantine() / "w", seed % 3), name="a")
            registry.remove("a")
            seed += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            for record in registry.list():
                assert record.bytes > 0
                with suppress(ExpertUnavailableError, StoreError):  # removed since it was listed
                    assert digest_of(registry.expert_path(record.digest)) == record.digest
    finally:
        stop.set()
        writer.join()


def test_kill_minus_nine_at_any_instant(tmp_path: Path) -> None:
    samples = tmp_path / "samples"
    samples.mkdir()
    for seed in range(3):
        write_sample(samples / f"sample-{seed}", seed)
    rng = random.Random(0)
    seen = 0
    for kill in range(20):
        arguments = [str(tmp_path / "store"), str(samples), str(kill)]
        with subprocess.Popen(
            [sys.executable, "-m", "tests.store.publish_forever", *arguments],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            time.sleep(rng.uniform(0.0, 0.05))
            process.kill()
        store = DiskStore(tmp_path / "store")
        assert [path.name for path in (tmp_path / "store" / "quarantine").iterdir()] == [store.quarantine().name]
        registry = Registry(store, base_manifest(), RESERVED)
        records = registry.list()
        seen += len(records)
        assert len(records) == len(store.records()), "no record is damaged"
        for record in records:
            assert digest_of(registry.expert_path(record.digest)) == record.digest
            assert registry.exemplars(record)
        assert store.blobs() == set().union(*(record.blobs for record in records)), "no garbage is left"
        store.close()
    assert seen > 0
