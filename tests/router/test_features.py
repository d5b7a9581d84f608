"""Features are checked, asked for in batches, and cached so that damage costs time only."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.features import FeatureCache, Features, checked, featurize_all
from store.errors import SwitchyardError

ROWS = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    return FeatureCache(tmp_path / "features", "fingerprint", 4)


def test_batches_are_bounded_and_in_order() -> None:
    asked: list[int] = []

    async def featurize(texts: Sequence[str]) -> Features:
        asked.append(len(texts))
        return np.array([[float(text)] for text in texts], dtype=np.float32)

    features = asyncio.run(featurize_all(featurize, [str(i) for i in range(10)], 4))
    assert asked == [4, 4, 2]
    assert features[:, 0].tolist() == list(range(10))


@pytest.mark.parametrize(
    "features",
    [
        np.zeros((2, 4), dtype=np.float32),
        np.zeros((3,), dtype=np.float32),
        np.zeros((3, 0), dtype=np.float32),
        np.array([[1.0], [np.nan], [1.0]], dtype=np.float32),
        np.array([[1.0], [np.inf], [1.0]], dtype=np.float32),
    ],
)
def test_what_is_no_set_of_features_is_refused(features: Features) -> None:
    with pytest.raises(SwitchyardError):
        checked(features, 3)


def test_round_trip(cache: FeatureCache, tmp_path: Path) -> None:
    assert cache.load("key", 3) is None
    cache.save("key", ROWS)
    loaded = cache.load("key", 3)
    assert loaded is not None
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded, ROWS)
    assert [path.suffix for path in (tmp_path / "features").iterdir()] == [".npy"]


def test_the_file_is_a_plain_npy(cache: FeatureCache, tmp_path: Path) -> None:
    cache.save("key", ROWS)
    (path,) = (tmp_path / "features").iterdir()
    np.testing.assert_array_equal(np.load(path, allow_pickle=False), ROWS)


def test_other_features_are_not_found(cache: FeatureCache, tmp_path: Path) -> None:
    cache.save("key", ROWS)
    folder = tmp_path / "features"
    assert cache.load("other", 3) is None
    assert cache.load("key", 2) is None
    assert FeatureCache(folder, "another base", 4).load("key", 3) is None
    assert FeatureCache(folder, "fingerprint", 5).load("key", 3) is None
    assert FeatureCache(folder, "fingerprint", 4, variant="bfloat16").load("key", 3) is None


def test_a_key_is_no_path(cache: FeatureCache, tmp_path: Path) -> None:
    cache.save("../../outside", ROWS)
    assert cache.load("../../outside", 3) is not None
    assert [path.name for path in tmp_path.iterdir()] == ["features"]


@settings(deadline=None)
@given(st.data())
def test_damage_is_noticed(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cache = FeatureCache(Path(folder), "fingerprint", 4)
        cache.save("key", ROWS)
        (path,) = Path(folder).iterdir()
        whole = path.read_bytes()
        position = data.draw(st.integers(0, len(whole) - 1))
        if data.draw(st.booleans(), label="truncate"):
            path.write_bytes(whole[:position])
        else:
            flipped = bytes([whole[position] ^ data.draw(st.integers(1, 255))])
            path.write_bytes(whole[:position] + flipped + whole[position + 1 :])
        assert cache.load("key", 3) is None
        cache.save("key", ROWS)
        assert cache.load("key", 3) is not None


def test_a_disk_that_refuses_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = FeatureCache(tmp_path / "file", "fingerprint", 4)
    cache.save("key", ROWS)
    assert cache.load("key", 3) is None


def test_a_cache_that_can_only_be_read_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = FeatureCache(tmp_path, "fingerprint", 4)
    cache.save("key", np.ones((2, 3), dtype=np.float32))

    def refused(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "utime", refused)
    assert cache.load("key", 2) is not None
