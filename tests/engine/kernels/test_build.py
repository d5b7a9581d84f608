"""The native library: built once, whole or not at all, and wherever there is room."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from server.engine.kernels import build
from server.engine.kernels.build import BuildError, load


@pytest.fixture
def source(tmp_path: Path) -> Path:
    try:
        build.find_compiler()
    except BuildError:
        pytest.skip("there is no C++ compiler")
    path = tmp_path / "answer.cpp"
    path.write_text('extern "C" int answer() { return 42; }\n')
    return path


def answer(library: ctypes.CDLL) -> int:
    found: int = library.answer()
    return found


def test_it_is_built_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert answer(load(tmp_path, sources=(source,))) == 42
    (kept,) = (tmp_path / "kernels").iterdir()
    before = kept.stat().st_mtime_ns
    assert answer(load(tmp_path, sources=(source,))) == 42
    assert [file.stat().st_mtime_ns for file in (tmp_path / "kernels").iterdir()] == [before]


@pytest.mark.parametrize("left", [0, 4096])
def test_a_damaged_file_is_built_anew(source: Path, tmp_path: Path, left: int) -> None:
    """Cut short by a crash, say: loading it would end the process, at every start."""
    load(tmp_path, sources=(source,))
    (kept,) = (tmp_path / "kernels").iterdir()
    whole = kept.read_bytes()
    kept.unlink()
    kept.write_bytes(whole[:left])
    assert answer(load(tmp_path, sources=(source,))) == 42
    assert [file.read_bytes() == whole for file in (tmp_path / "kernels").iterdir()] == [True]


def test_a_folder_that_cannot_be_written_to_costs_a_build(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    assert answer(load(tmp_path / "file", sources=(source,))) == 42
    assert "cannot be kept" in caplog.text
