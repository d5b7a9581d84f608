"""Which kernels run, and how the native ones come to be."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import pytest
import torch

from server.engine.kernels import available, backend, build
from server.engine.kernels.build import BuildError, Recipe
from server.engine.kernels.cpu import CpuKernels
from store.errors import InvalidRequestError

CPU = torch.device("cpu")
QUICK = ("-O0",)
"""Compiles in a fraction of the time."""


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)


@pytest.fixture
def compiler() -> str:
    try:
        return build.find_compiler()
    except BuildError as error:
        pytest.skip(str(error))


def test_an_unknown_implementation_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"must be auto, .*; not abacus") as caught:
        backend("abacus", CPU)
    assert caught.value.param == "kernels"


def test_the_reference_is_always_there() -> None:
    assert available(torch.device("meta"))["reference"] is None
    assert backend("reference", CPU).name == "reference"
    assert backend("auto", torch.device("meta")).name == "reference"


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_the_reference_runs_and_the_log_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert backend("auto", CPU, tmp_path).name == "reference"
    assert "not cpu: there is no C++ compiler" in caplog.text
    with pytest.raises(InvalidRequestError, match=r"there is no C\+\+ compiler .*apt-get install"):
        backend("cpu", CPU, tmp_path)


def test_a_compiler_that_fails_is_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\n[ \"$1\" = --version ] || { echo 'native.cpp:1: error: too odd' >&2; exit 1; }\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert "broken-c++ failed: native.cpp:1: error: too odd" in (available(CPU, tmp_path)["cpu"] or "")
    assert backend("auto", CPU, tmp_path).name == "reference"


def test_what_computes_wrongly_is_not_used(compiler: str, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="computes wrongly"):
        CpuKernels(tmp_path, flags=(*QUICK, "-Dswitchyard_add_linear=unused", "-include", str(_imposter(tmp_path))))


def _imposter(folder: Path) -> Path:
    path = folder / "imposter.h"
    path.write_text(
        "#undef switchyard_add_linear\n"
        'extern "C" __attribute__((weak)) void switchyard_add_linear(void) {}\n'
        "#define switchyard_add_linear unused\n"
    )
    return path


@pytest.mark.parametrize("failure", [RuntimeError("Failed to find C compiler"), None])
def test_a_triton_that_does_not_work_is_not_used(monkeypatch: pytest.MonkeyPatch, failure: Exception | None) -> None:
    gpu = pytest.importorskip("server.engine.kernels.gpu", reason="triton is not installed")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("there is a GPU")

    def broken(*given: object) -> None:
        if failure is not None:
            raise failure

    assert available(CPU)["triton"] is None
    monkeypatch.setattr(gpu.TritonKernels, "fused_linear", broken)
    why = "Failed to find C compiler" if failure else "computes wrongly"
    assert why in (available(CPU)["triton"] or "")
    with pytest.raises(InvalidRequestError, match=why):
        backend("triton", CPU)


def test_a_library_is_built_once_whoever_asks(compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = [threading.Thread(target=CpuKernels, args=(tmp_path,), kwargs={"flags": QUICK}) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (built,) = (tmp_path / "kernels").iterdir()
    written = built.stat().st_mtime_ns
    CpuKernels(tmp_path, flags=QUICK)
    assert built.stat().st_mtime_ns == written
    monkeypatch.setattr(build, "_cpu", lambda: "another machine that shares the folder")
    CpuKernels(tmp_path, flags=QUICK)
    assert len(list((tmp_path / "kernels").iterdir())) == 2


def test_without_openmp_it_runs_on_one_thread(compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unusable = Recipe("no such flag", ("-fno-such-flag",))
    unloadable = Recipe("leaves a symbol open", ("-Dabort=nobody_has_this",))
    monkeypatch.setattr(build, "RECIPES", (unusable, unloadable, build.RECIPES[-1]))
    assert not CpuKernels(tmp_path, flags=QUICK).parallel


def test_torchs_own_threads_are_used(compiler: str, tmp_path: Path) -> None:
    if "openmp" not in torch.__config__.parallel_info().lower().split("backend:")[-1]:
        pytest.skip("this torch has no OpenMP")
    before = _openmp_libraries()  # faiss may have brought one of its own
    assert CpuKernels(tmp_path, flags=QUICK).parallel
    assert _openmp_libraries() == before


def _openmp_libraries() -> set[str]:
    return {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
