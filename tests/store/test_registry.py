from __future__ import annotations

import dataclasses
import difflib
import errno
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from store.backends import ABSENT, ANYTHING, BlobStore
from store.backends.disk import DiskStore
from store.card import Card
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
from store.record import KEPT_VERSIONS
from store.registry import Registry
from tests.store.builders import base_manifest, write_sample
from tests.store.conftest import Opener

RESERVED = frozenset({"auto", "smollm2"})


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[DiskStore]:
    store = DiskStore(tmp_path / "store")
    yield store
    store.close()


@pytest.fixture
def registry(store: BlobStore) -> Registry:
    return Registry(store, base_manifest(), RESERVED)


def upload(store: BlobStore, seed: int = 0, **info: object) -> Path:
    return write_sample(store.quarantine() / f"upload-{seed}", seed, **info)


def test_publish_find_remove(store: BlobStore, registry: Registry) -> None:
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
    assert digest_of(registry.expert_path(digest)) == digest, "what runs on it can finish"
    registry.collect_garbage(0)
    assert store.blobs() == set()
    with pytest.raises(ExpertUnavailableError):
        registry.expert_path(digest)


def test_records_survive_a_restart(store: BlobStore, registry: Registry, opener: Opener) -> None:
    record, _ = registry.publish(upload(store), name="a", exemplars=["one", "two", "one"])
    reopened = Registry(opener(), base_manifest(), RESERVED)
    assert reopened.list() == [record]
    assert reopened.exemplars(record) == ["one", "two"]


def test_names(store: BlobStore, registry: Registry) -> None:
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


def test_publishing_again_is_no_error(store: BlobStore, registry: Registry) -> None:
    first, _ = registry.publish(upload(store), name="a")
    assert registry.publish(upload(store), name="a") == (first, False)
    assert registry.publish(upload(store), name="a", exemplars=registry.exemplars(first)) == (first, False)
    with pytest.raises(ConflictError, match="other exemplars"):
        registry.publish(upload(store), name="a", exemplars=["new"])
    with pytest.raises(ConflictError, match="another expert"):
        registry.publish(upload(store, seed=1), name="a")
    assert registry.list() == [first]


def test_uploaded_exemplars_win_and_leave_with_the_expert(store: BlobStore, registry: Registry) -> None:
    mine = ["line\nbreak", "é 🙂", '"']
    record, _ = registry.publish(upload(store), name="a", exemplars=mine)
    assert record.exemplar_count == 3
    assert registry.exemplars(record) == mine
    assert registry.publish(upload(store), name="a") == (record, False)
    assert store.blobs() == {record.digest, record.exemplars_digest}
    registry.remove("a")
    registry.collect_garbage(0)
    assert store.blobs() == set()


def test_bytes_stay_while_another_name_needs_them(store: BlobStore, registry: Registry) -> None:
    first, _ = registry.publish(upload(store), name="a", exemplars=["x"])
    second, _ = registry.publish(upload(store), name="b")
    registry.remove("a")
    registry.collect_garbage(0)
    assert store.blobs() == {second.digest}
    assert first.digest == second.digest
    registry.expert_path(second.digest)


def test_unknown_names_get_a_hint(store: BlobStore, registry: Registry) -> None:
    registry.publish(upload(store), name="numerals")
    with pytest.raises(NotFoundError, match="did you mean numerals"):
        registry.get("numeral")
    for name in ["zzz", "../numerals", "", "x" * 300]:
        with pytest.raises(NotFoundError):
            registry.get(name)
    with pytest.raises(NotFoundError):
        registry.remove("zzz")


def test_hints_of_a_large_library_cost_little(disk: DiskStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Names that are not there are free to ask for: few of the others are compared letter by letter."""
    registry = Registry(disk, base_manifest(), RESERVED)
    registry.publish(upload(disk), name="one")
    records = tmp_path / "store" / "records"
    document = json.loads((records / "one.json").read_text())
    names = [f"customer-{row % 97}.support-{row:05}-v{row % 7}" for row in range(2_000)]
    for name in names:
        (records / f"{name}.json").write_text(json.dumps(document | {"name": name}))
    registry = Registry(disk, base_manifest(), RESERVED)
    compared: list[int] = []
    close = difflib.get_close_matches

    def counting(word: str, known: Sequence[str], n: int) -> list[str]:
        compared.append(len(known))
        return close(word, known, n=n)

    monkeypatch.setattr(difflib, "get_close_matches", counting)
    wanted = names[1234]
    for row in (0, 9, len(wanted) - 1):
        for typo in (
            wanted[:row] + wanted[row + 1 :],
            wanted[:row] + "x" + wanted[row:],
            wanted[:row] + "x" + wanted[row + 1 :],
        ):
            with pytest.raises(NotFoundError, match=f"did you mean .*{wanted}"):
                registry.get(typo)
    with pytest.raises(NotFoundError, match=r"'qqqqqqqq'$"):
        registry.get("qqqqqqqq")
    assert max(compared) <= 12


def test_bad_files_stay_out(store: BlobStore, registry: Registry) -> None:
    path = upload(store)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ExpertFileError):
        registry.publish(path, name="a")
    with pytest.raises(WrongBaseError):
        Registry(store, base_manifest(seed=1), RESERVED).publish(upload(store), name="a")
    assert registry.list() == []
    registry.collect_garbage(0)
    assert store.blobs() == set()


def test_damaged_and_missing_bytes_are_noticed_and_healed(disk: DiskStore) -> None:
    registry = Registry(disk, base_manifest(), RESERVED)
    record, _ = registry.publish(upload(disk), name="a")
    path = registry.expert_path(record.digest)
    path.chmod(0o644)
    path.write_bytes(b"x" + path.read_bytes()[1:])
    with pytest.raises(ExpertUnavailableError, match="damaged"):
        registry.expert_path(record.digest)
    path.unlink()
    with pytest.raises(ExpertUnavailableError, match="gone"):
        registry.exemplars(record)
    assert registry.publish(upload(disk), name="a") == (record, False)
    assert digest_of(registry.expert_path(record.digest)) == record.digest


def test_a_damaged_record_hides_no_other(disk: DiskStore, tmp_path: Path) -> None:
    registry = Registry(disk, base_manifest(), RESERVED)
    keep, _ = registry.publish(upload(disk), name="a")
    registry.publish(upload(disk, seed=1), name="b")
    (tmp_path / "store" / "records" / "b.json").write_text('{"name": "b"')
    registry = Registry(disk, base_manifest(), RESERVED)
    assert registry.list() == [keep]
    with pytest.raises(NotFoundError):
        registry.get("b")
    registry.collect_garbage(0)
    assert len(disk.blobs()) == 2, "blobs a damaged record may need are kept"
    healed, created = registry.publish(upload(disk, seed=1), name="b")
    assert created
    assert registry.list() == [keep, healed]


def test_experts_of_another_base_keep_their_names(store: BlobStore, registry: Registry) -> None:
    registry.publish(upload(store), name="a")
    other = Registry(store, base_manifest(seed=1), RESERVED)
    assert other.list() == []
    with pytest.raises(ExpertUnavailableError, match="another base"):
        other.get("a")
    other.remove("a")
    assert registry.list() == []


def test_another_process_is_seen_within_a_second(store: BlobStore, registry: Registry, opener: Opener) -> None:
    other_store = opener()
    other = Registry(other_store, base_manifest(), RESERVED)
    began = time.monotonic()
    record, _ = other.publish(upload(other_store), name="a")
    while registry.list() != [record]:
        assert time.monotonic() - began < 10
    assert digest_of(registry.expert_path(record.digest)) == record.digest
    registry.remove("a")
    while other.list():
        assert time.monotonic() - began < 10


def test_threads_that_publish_one_name_agree(store: BlobStore, registry: Registry) -> None:
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


def test_compare_and_set(store: BlobStore) -> None:
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


def test_the_quarantine_of_the_dead_is_emptied_and_of_the_living_kept(disk: DiskStore, tmp_path: Path) -> None:
    (disk.quarantine() / "upload").write_bytes(b"x")
    dead = tmp_path / "store" / "quarantine" / "dead"
    dead.mkdir()
    (dead / "upload").write_bytes(b"x")
    DiskStore(tmp_path / "store").close()
    assert not dead.exists()
    assert (disk.quarantine() / "upload").exists()


def test_garbage_of_a_killed_publish_is_collected(store: BlobStore, registry: Registry) -> None:
    record, _ = registry.publish(upload(store), name="a")
    orphan = upload(store, seed=1)
    store.put_blob(orphan, digest_of(orphan))
    assert len(store.blobs()) == 2
    Registry(store, base_manifest(), RESERVED).collect_garbage(0)
    assert store.blobs() == {record.digest}


@pytest.mark.parametrize(
    ("code", "message"), [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "permission"), (errno.EROFS, "read-only")]
)
@pytest.mark.parametrize("call", [1, 2, 3, 4, 5])
def test_nothing_half_visible_when_the_disk_fails(
    disk: DiskStore, monkeypatch: pytest.MonkeyPatch, code: int, message: str, call: int
) -> None:
    registry = Registry(disk, base_manifest(), RESERVED)
    path = upload(disk)
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
    registry = Registry(disk, base_manifest(), RESERVED)
    visible = registry.list()
    registry.collect_garbage(0)
    assert disk.blobs() == set().union(*(record.blobs for record in visible))
    for record in visible:
        registry.expert_path(record.digest)
    again = path if path.exists() else upload(disk)
    registry.publish(again, name="a")
    assert [record.name for record in registry.list()] == ["a"]


def test_a_store_that_cannot_be_opened_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="cannot open the store"):
        DiskStore(tmp_path / "file")


def test_readers_meet_whole_experts_while_others_write(store: BlobStore, registry: Registry) -> None:
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


def test_replacing_keeps_what_was_and_can_go_back(store: BlobStore, registry: Registry, opener: Opener) -> None:
    first, _ = registry.publish(upload(store, 0), name="a", exemplars=["one"])
    second, changed = registry.publish(upload(store, 1), name="a", replace=True)
    assert changed
    assert registry.get("a") == second
    assert second.versions == (dataclasses.replace(second, earlier=()), first)
    assert digest_of(registry.expert_path(first.digest)) == first.digest, "what runs on it can finish"
    assert registry.publish(upload(store, 1), name="a", replace=True) == (second, False)
    third, _ = registry.publish(upload(store, 1), name="a", exemplars=["two"], replace=True)
    assert registry.exemplars(third) == ["two"]
    assert len(third.versions) == 3

    back = registry.roll_back("a", first.digest)
    assert registry.exemplars(back) == ["one"]
    assert [one.digest for one in back.versions] == [first.digest, second.digest, second.digest]
    assert registry.roll_back("a").versions[0] == third.versions[0], "the latest earlier one"
    with pytest.raises(NotFoundError, match="no earlier version ffff"):
        registry.roll_back("a", "f" * 64)
    with pytest.raises(NotFoundError, match="no expert named"):
        registry.roll_back("b")
    fresh, _ = registry.publish(upload(store, 2), name="b", replace=True)
    assert fresh.earlier == ()
    with pytest.raises(NotFoundError, match="b has no earlier version"):
        registry.roll_back("b")

    assert Registry(opener(), base_manifest(), RESERVED).list() == registry.list()
    registry.remove("a")
    registry.collect_garbage(0)
    assert store.blobs() == {fresh.digest}


def test_versions_beyond_the_limit_leave_with_their_bytes(store: BlobStore, registry: Registry) -> None:
    digests = [registry.publish(upload(store, i), name="a", replace=True)[0].digest for i in range(KEPT_VERSIONS + 3)]
    versions = registry.get("a").versions
    assert [one.digest for one in versions] == digests[::-1][: KEPT_VERSIONS + 1]
    registry.collect_garbage(0)
    assert store.blobs() == {one.digest for one in versions}


def test_a_name_that_goes_to_and_fro_keeps_each_version_once(
    store: BlobStore, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    for turn in range(3 * KEPT_VERSIONS):
        monkeypatch.setattr("store.record.time.time", lambda now=turn: 1e9 + now)
        record, is_new = registry.publish(upload(store, turn % 2), name="a", replace=True)
        assert is_new
    assert len(record.earlier) == 2
    assert registry.get("a") == record
    other = record.earlier[0]
    assert registry.roll_back("a").versions == (other, record.versions[0])
    assert registry.get("a").digest == other.digest


def test_a_version_whose_bytes_are_gone_is_not_gone_back_to(disk: DiskStore) -> None:
    registry = Registry(disk, base_manifest(), RESERVED)
    first, _ = registry.publish(upload(disk, 0), name="a")
    second, _ = registry.publish(upload(disk, 1), name="a", replace=True)
    disk.fetch(first.digest).unlink()
    with pytest.raises(ExpertUnavailableError, match="gone"):
        registry.roll_back("a")
    assert registry.get("a") == second


def test_a_publication_can_be_taken_back(store: BlobStore, registry: Registry) -> None:
    first, _ = registry.publish(upload(store, 0), name="a")
    second, _ = registry.publish(upload(store, 1), name="a", replace=True)
    registry.undo(second)
    assert registry.list() == [first]
    registry.collect_garbage(0)
    assert store.blobs() == {first.digest}
    registry.undo(second)
    assert registry.list() == [first], "somebody else has changed it since"
    registry.undo(first)
    assert registry.list() == []
    registry.collect_garbage(0)
    assert store.blobs() == set()


def test_words_change_and_the_file_does_not(store: BlobStore, registry: Registry) -> None:
    first, _ = registry.publish(upload(store, 0, card=Card(author="ada", tags=("x",), metadata={"k": "v"})), name="a")
    told = registry.describe("a", description="told", tags=["y", "z"], metadata={"l": "w"})
    card = Card(author="ada", tags=("y", "z"), metadata={"k": "v", "l": "w"})
    assert told == dataclasses.replace(first, description="told", card=card)
    assert registry.get("a") == told
    assert registry.describe("a") == told
    assert registry.describe("a", metadata={"k": None, "none": None}).card.metadata == {"l": "w"}
    with pytest.raises(InvalidRequestError) as caught:
        registry.describe("a", tags=["No"])
    assert caught.value.param == "tags"
    with pytest.raises(NotFoundError):
        registry.describe("b", description="x")
    second, _ = registry.publish(upload(store, 1), name="a", replace=True)
    assert second.card == Card(), "a new file speaks for itself"
    assert registry.roll_back("a").card.tags == ("y", "z")
    assert registry.get("a").versions[1] == second.versions[0]


def test_records_of_older_versions_can_be_read_and_changed(disk: DiskStore, tmp_path: Path) -> None:
    registry = Registry(disk, base_manifest(), RESERVED)
    registry.publish(upload(disk, 0), name="a", exemplars=["x"])
    registry.publish(upload(disk, 1), name="a", replace=True)
    path = tmp_path / "store" / "records" / "a.json"
    old = json.loads(path.read_text())
    for version in (old, *old["earlier"]):
        for key in ("author", "license", "tags", "parents", "metadata"):
            version.pop(key, None)
    path.write_text(json.dumps(old))  # and laid out otherwise
    disk.put_record("other", b"{}", expected=ANYTHING)  # so that readers look again
    registry = Registry(disk, base_manifest(), RESERVED)
    assert registry.get("a").card == Card()
    registry.roll_back("a")
    registry.describe("a", tags=["x"])
    assert [version.card.tags for version in registry.get("a").versions] == [("x",), ()]


def test_pages(disk: DiskStore) -> None:
    registry = Registry(disk, base_manifest(), RESERVED)
    names = ["ant", "bee", "cat", "cow", "dog"]
    for name in names:
        path = upload(disk, description=f"the {name.upper()} of it")
        registry.publish(path, name=name)

    def page(**given: Any) -> tuple[list[str], bool]:
        records, more = registry.page(**given)
        return [record.name for record in records], more

    assert page(limit=5) == (names, False)
    assert page(limit=2) == (["ant", "bee"], True)
    assert page(limit=2, after="bee") == (["cat", "cow"], True)
    assert page(limit=2, after="cx") == (["dog"], False)
    assert page(limit=2, after="dog") == ([], False)
    assert page(limit=1, matching="C") == (["cat"], True)
    assert page(limit=9, matching="the c") == (["cat", "cow"], False)
    assert page(limit=9, matching="the c", after="cat") == (["cow"], False)
    assert page(limit=9, matching="x") == ([], False)
