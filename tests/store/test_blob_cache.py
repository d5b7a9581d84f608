"""The disk cache: bytes bound it, whoever fills it, and it gives out nothing but sound copies."""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from store.backends.blob_cache import BlobCache


def put(cache: BlobCache, data: bytes) -> str:
    path = cache.quarantine() / "incoming"
    path.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    cache.add(path, digest)
    return digest


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "blobs").glob("*/*"))


@pytest.mark.parametrize("seed", range(5))
def test_two_processes_keep_one_folder_within_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Each has its own idea of what was used last; neither lets the folder grow, and neither trips over the other."""
    monkeypatch.setattr("store.backends.blob_cache._OPENING_SECONDS", -1.0)
    rng = random.Random(seed)
    caches = [BlobCache(tmp_path, 1000), BlobCache(tmp_path, 1000)]
    blobs = {
        hashlib.sha256(data).hexdigest(): data for data in (rng.randbytes(rng.randint(50, 400)) for _ in range(12))
    }
    hits = 0
    for _ in range(200):
        cache, digest = rng.choice(caches), rng.choice(list(blobs))
        found = cache.read(digest)
        if found is None:
            assert put(cache, blobs[digest]) == digest
            assert cache.read(digest) == blobs[digest], "what has just come is there"
        else:
            hits += 1
            assert found == blobs[digest]
        assert on_disk(tmp_path) <= 1000
    assert hits > 20
    assert all(cache.stats().evictions for cache in caches)
    for cache in caches:
        assert cache.stats().faults == 0, "what another process has removed is no damage"
        cache.close()


def test_a_path_that_was_just_handed_out_stays(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, 250)
    first = put(cache, b"a" * 100)
    path = cache.get(first)
    assert path is not None
    for data in (b"b" * 100, b"c" * 100, b"d" * 100):
        put(cache, data)
    assert path.read_bytes() == b"a" * 100
    cache.close()


def test_a_path_that_another_process_has_just_handed_out_stays(tmp_path: Path) -> None:
    first, other = BlobCache(tmp_path, 1000), BlobCache(tmp_path, 10)
    digest = put(first, b"a" * 100)
    blob = first.get(digest)
    assert blob is not None
    hour_ago = time.time() - 3600
    os.utime(blob, (hour_ago, hour_ago))  # it has been there for long
    first.close()
    first = BlobCache(tmp_path, 1000)
    other._adopt()
    path = first.get(digest)
    assert path is not None
    put(other, b"b" * 100)
    assert path.read_bytes() == b"a" * 100
    other.close()
    first.close()


def test_a_file_that_was_touched_a_moment_ago_is_neither_touched_nor_hashed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = BlobCache(tmp_path, 1000)
    digest = put(cache, b"a" * 100)
    path = cache.get(digest)
    assert path is not None
    before = path.stat().st_mtime_ns
    monkeypatch.setattr("hashlib.file_digest", None)
    assert cache.get(digest) == path
    assert path.stat().st_mtime_ns == before
    cache.close()


def test_a_blob_that_comes_while_another_thread_lists_the_folder_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = BlobCache(tmp_path, 1000)
    real = Path.glob
    late: list[str] = []

    def glob(folder: Path, pattern: str) -> Iterator[Path]:
        found = list(real(folder, pattern))
        if not late:
            late.append("")
            late[0] = put(cache, b"late")
        return iter(found)

    monkeypatch.setattr(Path, "glob", glob)
    put(cache, b"first")
    assert cache.read(late[0]) == b"late"
    cache.close()


def test_a_blob_larger_than_the_limit_is_given_out_all_the_same(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, 10)
    digest = put(cache, b"x" * 100)
    assert cache.read(digest) == b"x" * 100
    cache.close()


def test_a_cache_that_is_opened_again_knows_what_is_there(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, 1000)
    digest = put(cache, b"kept")
    cache.close()
    again = BlobCache(tmp_path, 1000)
    assert again.has(digest)
    assert (again.used, again.read(digest)) == (4, b"kept")
    again.close()
