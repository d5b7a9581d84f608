"""Uploads in pieces: whatever is interrupted goes on, whatever is wrong is gone, and everything is bounded."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store.errors import (
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    QueueFullError,
    StorageFullError,
    StoreError,
    SwitchyardError,
    TooLargeError,
)
from store.uploads import Uploads

DATA = random.Random(0).randbytes(1000)
SHA = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "uploads"


def open_uploads(folder: Path, *, max_bytes: int = 10_000, max_open: int = 4, seconds: float = 60) -> Uploads:
    return Uploads(folder, max_bytes=max_bytes, max_open=max_open, seconds=seconds)


def append(uploads: Uploads, upload: str, offset: int, *pieces: bytes) -> int:
    appending = uploads.begin(upload, offset)
    try:
        for piece in pieces:
            appending.write(piece)
    finally:
        uploads.end(appending)
    return appending.offset


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"lock"}


@pytest.mark.parametrize("declared", [SHA, None])
def test_in_one_piece(folder: Path, tmp_path: Path, declared: str | None) -> None:
    uploads = open_uploads(folder)
    upload, created = uploads.create("model.safetensors", len(DATA), declared)
    assert created
    assert append(uploads, upload.id, 0, DATA[:300], DATA[300:]) == len(DATA)
    there = uploads.get(upload.id)
    assert (there.offset, there.digest, there.filename) == (len(DATA), SHA, "model.safetensors")
    file = uploads.take(upload.id, tmp_path / "taken")
    assert (file.path.read_bytes(), file.digest, file.bytes) == (DATA, SHA, len(DATA))
    uploads.delete(upload.id)
    assert left(folder) == set()
    assert file.path.read_bytes() == DATA
    with pytest.raises(NotFoundError):
        uploads.take(upload.id, tmp_path / "again")


@settings(deadline=None)  # it writes to a disk
@given(cuts=st.lists(st.tuples(st.integers(1, 400), st.sampled_from(["same", "new process", "lost tail"]))))
def test_any_pieces_and_restarts(tmp_path_factory: pytest.TempPathFactory, cuts: list[tuple[int, str]]) -> None:
    folder = tmp_path_factory.mktemp("any")
    uploads = open_uploads(folder)
    upload, _ = uploads.create("f", len(DATA), SHA)
    for size, then in cuts:
        offset = uploads.get(upload.id).offset
        append(uploads, upload.id, offset, DATA[offset : offset + size])
        if then != "same":
            uploads = open_uploads(folder)
        if then == "lost tail" and uploads.get(upload.id).digest is None:  # the machine went down
            with (folder / f"{upload.id}.part").open("ab") as file:
                file.truncate(max(0, file.tell() - 7))
    offset = uploads.get(upload.id).offset
    append(uploads, upload.id, offset, DATA[offset:])
    assert uploads.take(upload.id, folder / "taken").path.read_bytes() == DATA
    shutil.rmtree(folder)


def test_the_same_file_again_goes_on(folder: Path) -> None:
    uploads = open_uploads(folder)
    first, _ = uploads.create("f", len(DATA), SHA)
    append(uploads, first.id, 0, DATA[:10])
    again, created = open_uploads(folder).create("f", len(DATA), SHA)
    assert (again.id, again.offset, created) == (first.id, 10, False)
    assert uploads.create("g", len(DATA), SHA)[1]
    assert uploads.create("f", len(DATA))[1], "without a digest nobody knows whether it is the same"


def test_wrong_bytes_are_gone(folder: Path) -> None:
    uploads = open_uploads(folder)
    for restart in (False, True):
        upload, _ = uploads.create("f", len(DATA), SHA)
        append(uploads, upload.id, 0, DATA[:10])
        uploads = open_uploads(folder) if restart else uploads
        with pytest.raises(InvalidRequestError) as refused:
            append(uploads, upload.id, 10, bytes(len(DATA) - 10))
        assert refused.value.code == "checksum_mismatch"
        assert left(folder) == set()


def test_offsets_and_lengths(folder: Path, tmp_path: Path) -> None:
    uploads = open_uploads(folder)
    upload, _ = uploads.create("f", len(DATA))
    append(uploads, upload.id, 0, DATA[:10])
    for offset in (0, 9, 11):
        with pytest.raises(ConflictError, match="10 bytes"):
            append(uploads, upload.id, offset, b"x")
    with pytest.raises(TooLargeError):
        append(uploads, upload.id, 10, DATA[10:], b"x")
    assert uploads.get(upload.id).digest == SHA, "what was good of it is kept"
    other, _ = uploads.create("g", 5)
    with pytest.raises(ConflictError, match="0 of 5"):
        uploads.take(other.id, tmp_path / "taken")
    assert not (tmp_path / "taken").exists()


def test_one_piece_at_a_time(folder: Path) -> None:
    uploads = open_uploads(folder)
    upload, _ = uploads.create("f", len(DATA))
    first = uploads.begin(upload.id, 0)
    with pytest.raises(ConflictError) as refused:
        open_uploads(folder).begin(upload.id, 0)
    assert refused.value.code == "upload_in_use"
    first.write(DATA[:3])
    uploads.end(first)
    with pytest.raises(StoreError):
        first.write(b"late")
    assert append(open_uploads(folder), upload.id, 3, DATA[3:]) == len(DATA)


@pytest.mark.parametrize(
    ("filename", "size", "sha256", "param"),
    [
        ("../x", 1, None, "filename"),
        ("a/b", 1, None, "filename"),
        ("..", 1, None, "filename"),
        (".hidden", 1, None, "filename"),
        ("", 1, None, "filename"),
        ("x\0", 1, None, "filename"),
        ("x" * 201, 1, None, "filename"),
        ("x", 0, None, "bytes"),
        ("x", 1, "F" * 64, "sha256"),
    ],
)
def test_what_cannot_be_declared(folder: Path, filename: str, size: int, sha256: str | None, param: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        open_uploads(folder).create(filename, size, sha256)
    assert refused.value.param == param
    assert not folder.exists()


@pytest.mark.parametrize("upload_id", ["", "..", "lock", "upload_" + "0" * 32, "../upload_" + "0" * 32, "x" * 10_000])
def test_ids_that_are_none(folder: Path, upload_id: str) -> None:
    uploads = open_uploads(folder)
    uploads.create("f", 1)
    for call in (uploads.get, uploads.delete, lambda one: uploads.begin(one, 0)):
        with pytest.raises(NotFoundError):
            call(upload_id)


def test_bounds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = open_uploads(folder, max_bytes=100, max_open=3)
    uploads.create("a", 60)
    with pytest.raises(TooLargeError):
        uploads.create("b", 41)
    uploads.create("b", 20)
    uploads.create("c", 20)
    with pytest.raises(QueueFullError):
        open_uploads(folder, max_open=3).create("d", 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=110))
    with pytest.raises(StorageFullError):
        open_uploads(folder).create("d", 11)
    assert open_uploads(folder).create("d", 10)[1]


def test_no_tenant_shuts_out_the_others(folder: Path) -> None:
    """Each has half of what the others leave, with what its jobs work on; the operator has it all."""
    beside = {"acme": 30, None: 100}
    uploads = Uploads(folder, max_bytes=1100, max_open=8, seconds=60, beside=lambda: beside)
    with pytest.raises(TooLargeError, match="acme may have 500 bytes now, and 30 are taken"):
        uploads.create("a", 471, owner="acme")
    uploads.create("a", 470, owner="acme")
    with pytest.raises(TooLargeError):
        uploads.create("b", 1, owner="acme")
    with pytest.raises(TooLargeError):
        uploads.create("b", 251, owner="globex")
    uploads.create("b", 250, owner="globex")
    uploads.create("c", 125, owner="initech")
    assert uploads.create("d", 125)[1], "the operator"


def test_no_tenant_has_all_the_places(folder: Path) -> None:
    uploads = open_uploads(folder, max_open=4)
    for tenant, places in (("acme", 2), ("globex", 1), ("initech", 1)):
        for i in range(places):
            uploads.create(str(i), 1, owner=tenant)
        with pytest.raises(QueueFullError):
            uploads.create("x", 1, owner=tenant)
    with pytest.raises(QueueFullError):
        uploads.create("x", 1)


def test_a_full_disk_has_room_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = open_uploads(folder)
    upload, _ = uploads.create("f", len(DATA), SHA)
    append(uploads, upload.id, 0, DATA[:10])
    appending = uploads.begin(upload.id, 10)
    appending.write(DATA[10:20])

    def half(descriptor: int, data: memoryview) -> int:
        monkeypatch.undo()
        os.write(descriptor, data[:3])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(StorageFullError):
        appending.write(DATA[20:30])
    appending.take_back()
    uploads.end(appending)
    assert uploads.get(upload.id).offset == 10
    assert append(uploads, upload.id, 10, DATA[10:]) == len(DATA)
    assert uploads.get(upload.id).digest == SHA


def test_what_nobody_goes_on_with_is_forgotten(folder: Path) -> None:
    uploads = open_uploads(folder)
    old, young = (uploads.create(name, 10)[0] for name in ("old", "young"))
    os.utime(folder / f"{old.id}.part", (time.time() - 61,) * 2)
    (folder / f"upload_{'0' * 32}.part").touch()  # its maker was killed before it declared anything
    (folder / f".{old.id}.tmp").touch()
    uploads.expire()
    assert left(folder) == {f"{young.id}.json", f"{young.id}.part"}
    with pytest.raises(NotFoundError):
        uploads.get(old.id)


def test_damage_on_disk_is_an_absent_upload(folder: Path) -> None:
    uploads = open_uploads(folder)
    upload, _ = uploads.create("f", 10)
    (folder / f"{upload.id}.json").write_text("{")
    assert uploads.list() == []
    with pytest.raises(SwitchyardError):
        uploads.get(upload.id)
    uploads.expire()
    assert left(folder) == set()


def test_deleted_while_it_comes(folder: Path) -> None:
    uploads = open_uploads(folder)
    upload, _ = uploads.create("f", len(DATA))
    appending = uploads.begin(upload.id, 0)
    appending.write(DATA)
    uploads.delete(upload.id)
    with pytest.raises(NotFoundError):
        uploads.end(appending)
    assert left(folder) == set()


def test_another_file_system(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = open_uploads(folder)
    upload, _ = uploads.create("f", len(DATA))
    append(uploads, upload.id, 0, DATA)

    def elsewhere(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", elsewhere)
    assert uploads.take(upload.id, tmp_path / "taken").path.read_bytes() == DATA
