"""Addresses are read strictly and only where allowed; downloads are bounded in bytes and in time."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from store import remote
from store.errors import (
    InvalidRequestError,
    MissingPackageError,
    NotFoundError,
    StoreUnavailableError,
    TooLargeError,
)
from store.remote import Location, RemoteFolder, check_allowed, parse_location


@pytest.fixture
def memory() -> Iterator[Any]:
    """fsspec's store in memory, empty."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


def test_addresses() -> None:
    for url, text in (
        ("hf://org/repo", "hf://org/repo"),
        ("hf://org/repo@v1.0/sub/", "hf://org/repo@v1.0/sub"),
        ("s3://bucket/experts/a.safetensors", "s3://bucket/experts/a.safetensors"),
        ("file:///srv/experts", "file:///srv/experts"),
        ("memory://x", "memory:///x"),
    ):
        assert str(parse_location(url)) == text
        assert parse_location(text) == parse_location(url)
    assert parse_location("s3://b/x/a.safetensors").file == "a.safetensors"
    assert parse_location("s3://b/x/a.safetensors").folder == parse_location("s3://b/x")
    assert parse_location("s3://b/x").file is None


@pytest.mark.parametrize(
    "url",
    ["", "org/repo", "/srv/experts", "http://host/x", "https://host/x", "ftp://host/x", "S3://bucket", "s3:/bucket",
     "s3://", "s3:///x", "s3://bucket//x", "s3://bucket/../x", "s3://bucket/./x", "s3://bucket/%2e%2e/x",
     "s3://bucket/x?y", "s3://bucket/x#y", "s3://bucket/x y", "s3://bucket/x\\y", "s3://bucket/é", "s3://b/x\n",
     "simplecache::s3://bucket/x", "s3://bucket/x::hf://y", "s3://" + "x" * 1000,
     "s3://key:secret@bucket/x"],  # pragma: allowlist secret
)  # fmt: skip
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_location(url)
    assert caught.value.param == "url"


@pytest.mark.parametrize(
    ("url", "allowed", "may"),
    [
        ("hf://org/repo", ["hf://org"], True),
        ("hf://org/repo", ["hf://org/"], True),
        ("hf://org/repo@v2/x", ["hf://org/repo"], True),
        ("hf://org/repo@v2", ["hf://org/repo@v1"], False),
        ("hf://org/repo", ["hf://org/repo@v1"], False),
        ("hf://org/repo-evil", ["hf://org/repo"], False),
        ("hf://organisation/repo", ["hf://org"], False),
        ("hf://org", ["hf://org/repo"], False),
        ("s3://bucket/experts/x", ["hf://org", "s3://bucket/experts"], True),
        ("s3://bucket/experts-evil/x", ["s3://bucket/experts"], False),
        ("s3://bucket/other", ["s3://bucket/experts/"], False),
        ("s3://bucket@v2", ["s3://bucket"], False),
        ("gs://bucket/experts", ["s3://bucket/experts"], False),
        ("s3://bucket/x", [], False),
    ],
)
def test_only_below_what_is_allowed(url: str, allowed: list[str], may: bool) -> None:
    if may:
        check_allowed(parse_location(url), allowed)
        return
    with pytest.raises(InvalidRequestError, match="may not be read") as caught:
        check_allowed(parse_location(url), allowed)
    assert caught.value.param == "hub_allow"


segments = st.from_regex(r"[A-Za-z0-9_@=+.-]{1,12}", fullmatch=True).filter(lambda text: text not in (".", ".."))
locations = st.builds(
    lambda scheme, parts: Location(scheme, tuple(parts)),
    st.sampled_from(["hf", "s3", "file"]),
    st.lists(segments, min_size=1, max_size=5),
)


@given(locations, locations)
def test_below_means_below(one: Location, other: Location) -> None:
    assert parse_location(str(one)) == one
    assert one.is_below(one)
    assert (one / "x").is_below(one)
    assert not one.is_below(one / "x")
    if one.scheme != "hf":
        assert one.is_below(other) == f"{one}/".startswith(f"{other}/")


@given(st.text(max_size=60))
def test_whatever_is_given_has_one_reading_or_none(text: str) -> None:
    try:
        location = parse_location(f"s3://{text}")
    except InvalidRequestError:
        return
    assert ".." not in location.segments
    assert str(location) == f"s3://{text}".removesuffix("/")


def fill(files: Any, **contents: bytes) -> None:
    for name, data in contents.items():
        files.pipe_file(f"/x/{name.replace('_', '.')}", data)


def test_what_lies_there(memory: Any, tmp_path: Path) -> None:
    fill(memory, a_safetensors=b"one", a_jsonl=b"two", ab_safetensors=b"three", README=b"four")
    memory.pipe_file("/x/sub/b.safetensors", b"not looked into")
    folder = RemoteFolder(parse_location("memory://x"))
    there = folder.list()
    assert there.keys() == {"a.safetensors", "a.jsonl", "ab.safetensors", "README"}
    one = RemoteFolder(parse_location("memory://x/a.safetensors"))
    assert one.list() == {name: there[name] for name in ("a.safetensors", "a.jsonl")}
    memory.pipe_file("/x/a.safetensors", b"other")
    assert one.list()["a.safetensors"] != there["a.safetensors"]
    told: list[tuple[int, int]] = []
    received = folder.download(
        "a.safetensors", tmp_path, max_bytes=5, seconds=60, tell=lambda *figures: told.append(figures)
    )
    assert received.path.read_bytes() == b"other"
    assert (received.digest, received.bytes) == (hashlib.sha256(b"other").hexdigest(), 5)
    assert told == [(5, 5)]
    assert folder.read("a.jsonl", max_bytes=3) == b"two"


def test_downloads_are_bounded(memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(memory, a_safetensors=bytes(3 << 20))
    folder = RemoteFolder(parse_location("memory://x"))
    with pytest.raises(TooLargeError, match="3145728 bytes"):
        folder.download("a.safetensors", tmp_path, max_bytes=1000, seconds=60)
    with pytest.raises(TooLargeError):
        folder.read("a.safetensors", max_bytes=1000)
    with pytest.raises(StoreUnavailableError, match="took more than 0 s"):
        folder.download("a.safetensors", tmp_path, max_bytes=4 << 20, seconds=0)

    class Lying:
        """A file that is longer than its store says."""

        size = 10

        def __enter__(self) -> Lying:
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def read(self, size: int) -> bytes:
            return bytes(size)

    monkeypatch.setattr(folder._files, "open", lambda *_, **__: Lying())
    with pytest.raises(TooLargeError, match="limit of 2000000 bytes"):
        folder.download("a.safetensors", tmp_path, max_bytes=2_000_000, seconds=60)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there(memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(memory, a_safetensors=b"x")
    folder = RemoteFolder(parse_location("memory://x"))
    with pytest.raises(NotFoundError, match="nothing at memory:///x/none"):
        folder.download("none", tmp_path, max_bytes=10, seconds=60)
    with pytest.raises(NotFoundError):
        RemoteFolder(parse_location("memory://elsewhere")).list()

    def broken(*_: object, **__: object) -> None:
        raise ConnectionResetError("the cable was pulled\n" + "x" * 500)

    monkeypatch.setattr(folder._files, "ls", broken)
    with pytest.raises(StoreUnavailableError, match="ConnectionResetError: the cable was pulled x") as caught:
        folder.list()
    assert len(caught.value.message) < 300


def test_files_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "a.safetensors").write_bytes(b"one")
    folder = RemoteFolder(parse_location(f"file://{tmp_path}/e"))
    before = folder.list()
    assert before.keys() == {"a.safetensors"}
    (tmp_path / "e" / "a.safetensors").write_bytes(b"other")
    assert folder.list() != before
    (tmp_path / "q").mkdir()
    assert folder.download("a.safetensors", tmp_path / "q", max_bytes=10, seconds=60).bytes == 5


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> None:
        raise ImportError

    monkeypatch.setattr(fsspec, "filesystem", none)
    with pytest.raises(MissingPackageError, match=r"s3fs: pip install 'switchyard\[s3\]'"):
        RemoteFolder(parse_location("s3://bucket/x"))
    assert {name for name in remote._SCHEMES.values() if name} == {"huggingface_hub", "s3fs", "gcsfs", "adlfs"}
    assert importlib.util.find_spec("huggingface_hub") is not None
