"""Other exemplars for a published expert: the file stays, the blob comes and goes with its record."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from store.access import Caller, Role
from store.backends import BlobStore
from store.backends.copying import copy_blob
from store.backends.disk import DiskStore
from store.errors import (
    ExpertUnavailableError,
    InvalidRequestError,
    NotFoundError,
    NotPermittedError,
    StorageFullError,
    TooLargeError,
)
from store.exemplar_changes import put_exemplars
from store.registry import Registry
from tests.store.builders import base_manifest, write_sample
from tests.store.conftest import Opener

RESERVED = frozenset({"auto"})
OWN = ["Was ist das?", 'Say "hé"']


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[DiskStore]:
    store = DiskStore(tmp_path / "own")
    yield store
    store.close()


@pytest.fixture
def registry(store: BlobStore) -> Registry:
    registry = Registry(store, base_manifest(), RESERVED)
    registry.publish(write_sample(store.quarantine() / "upload", 0), name="a")
    return registry


def test_they_replace_those_of_the_file_and_give_way_to_them(
    store: BlobStore, registry: Registry, opener: Opener
) -> None:
    first = registry.get("a")
    edition = registry.edition
    changed = registry.set_exemplars("a", lambda _: ["one", "two", "one"])
    assert registry.edition != edition, "whoever follows the registry hears of it"
    assert changed == dataclasses.replace(first, exemplar_count=2, exemplars_digest=changed.exemplars_digest)
    assert registry.get("a") == changed
    assert registry.exemplars(changed) == ["one", "two"]
    other = Registry(opener(), base_manifest(), RESERVED)
    assert other.exemplars(other.get("a")) == ["one", "two"]

    assert registry.set_exemplars("a", lambda present: [*present(), "three"]).exemplar_count == 3
    assert list(store.quarantine().glob("*[!k]")) == [], "nothing lies about"
    registry.collect_garbage(0)
    assert store.blobs() == registry.get("a").blobs, "what nobody names any more goes"

    assert registry.set_exemplars("a", lambda _: None) == first
    assert registry.exemplars(first) == OWN
    assert registry.set_exemplars("a", lambda _: OWN) == first, "the same words need no blob"
    registry.collect_garbage(0)
    assert store.blobs() == {first.digest}


def test_a_version_keeps_its_own(store: BlobStore, registry: Registry) -> None:
    registry.set_exemplars("a", lambda _: ["one"])
    registry.publish(write_sample(store.quarantine() / "upload", 1), name="a", replace=True)
    registry.set_exemplars("a", lambda _: ["two"])
    registry.collect_garbage(0)
    assert registry.exemplars(registry.roll_back("a")) == ["one"]
    assert registry.exemplars(registry.roll_back("a")) == ["two"]


@pytest.mark.parametrize("given", [[], [" "], ["x"] * 3 + ["y" * (1 << 20)]])
def test_what_could_not_be_uploaded_is_refused(store: BlobStore, registry: Registry, given: list[str]) -> None:
    before = registry.get("a")
    with pytest.raises((InvalidRequestError, TooLargeError)) as caught:
        registry.set_exemplars("a", lambda _: given)
    assert caught.value.param == "exemplars"
    assert registry.get("a") == before
    assert store.blobs() == {before.digest}


def test_damaged_ones_can_be_replaced(disk: DiskStore) -> None:
    registry = Registry(disk, base_manifest(), RESERVED)
    registry.publish(write_sample(disk.quarantine() / "upload", 0), name="a")
    changed = registry.set_exemplars("a", lambda _: ["one"])
    assert changed.exemplars_digest is not None
    disk.fetch(changed.exemplars_digest).unlink()
    with pytest.raises(ExpertUnavailableError):
        registry.exemplars(changed)
    assert registry.exemplars(registry.set_exemplars("a", lambda _: ["two"])) == ["two"]


def test_only_the_owner_changes_them(registry: Registry) -> None:
    stranger = Caller("key", "acme", frozenset({Role.UPLOAD}))
    with pytest.raises(NotPermittedError):
        registry.set_exemplars("a", lambda _: ["one"], stranger)
    with pytest.raises(NotFoundError):
        registry.set_exemplars("b", lambda _: ["one"], stranger)


def test_a_disk_that_is_full_keeps_no_leftovers(disk: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(disk.quarantine().iterdir())

    real = tempfile.NamedTemporaryFile

    def filling(**given: Any) -> Any:
        file = real(**given)
        file.write = full
        return file

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", filling)
    with pytest.raises(StorageFullError, match="cannot store the exemplars: the disk is full"):
        put_exemplars(disk, b'"x"\n')
    assert set(disk.quarantine().iterdir()) == before
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)
    with pytest.raises(StorageFullError):
        put_exemplars(disk, b'"x"\n')


def test_a_copy_that_fails_is_the_store_s_error(disk: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = put_exemplars(disk, b'"x"\n')
    before = set(disk.quarantine().iterdir())
    copy_blob(disk, disk, digest)

    for module, name in ((shutil, "copyfile"), (tempfile, "NamedTemporaryFile")):
        monkeypatch.setattr(module, name, full)
        with pytest.raises(StorageFullError, match=r"cannot copy .*: the disk is full"):
            copy_blob(disk, disk, digest)
        assert set(disk.quarantine().iterdir()) == before
