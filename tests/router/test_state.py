"""The learned metric survives a restart, and nothing else does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from router.metric import LowRank
from router.state import Learned, StateFile


def learned(library: str = "library") -> Learned:
    rng = np.random.default_rng(0)
    return Learned(library, LowRank(rng.normal(size=6).astype(np.float32), rng.normal(size=(2, 6)).astype(np.float32)))


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    file = StateFile(tmp_path / "new" / "state", "space")
    assert file.load() is None
    file.save(learned("old"))
    file.save(learned())
    found = file.load()
    assert found is not None
    assert found.library == "library"
    np.testing.assert_array_equal(found.metric.origin, learned().metric.origin)
    np.testing.assert_array_equal(found.metric.matrix, learned().metric.matrix)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["state"]


def test_another_space_is_not_read(tmp_path: Path) -> None:
    StateFile(tmp_path / "state", "space").save(learned())
    assert StateFile(tmp_path / "state", "other").load() is None


@pytest.mark.parametrize("damage", [lambda data: data[:40], lambda data: b"", lambda data: b"\0" + data[1:]])
def test_damage_is_noticed(tmp_path: Path, damage: object) -> None:
    path = tmp_path / "state"
    StateFile(path, "space").save(learned())
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    assert StateFile(path, "space").load() is None


def test_a_folder_that_cannot_be_written_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    StateFile(tmp_path / "file" / "state", "space").save(learned())
