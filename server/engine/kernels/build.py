"""The C++ files beside this one → a shared library, with the system's own compiler at first use."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

_HERE = Path(__file__).parent
SOURCES = tuple(_HERE / f"{name}.cpp" for name in ("native", "merge", "integers", "step", "decode"))
HEADERS = tuple(sorted(_HERE.glob("*.hpp")))
COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-fno-strict-aliasing", "-fno-math-errno")
_TIMEOUT = 120.0
_LOCK = threading.Lock()


class BuildError(Exception):
    """There is no library; the message says why."""


@dataclass(frozen=True)
class Recipe:
    """How to build: what the compiler and what the linker are told."""

    name: str
    compile: tuple[str, ...] = ()
    link: tuple[str, ...] = ()


RECIPES = (
    # The symbols of OpenMP are left open, so that they bind to the copy that torch has brought into the process: a
    # second one would have threads of its own that compete with torch's.
    Recipe("torch's threads", ("-fopenmp",)),
    Recipe("threads of its own", ("-fopenmp",), ("-fopenmp",)),
    Recipe("one thread"),
)


def find_compiler() -> str:
    """A C++ compiler: `$CXX`, or the first of the usual names.

    Raises:
        BuildError: there is none.
    """
    for name in (os.environ.get("CXX"), *COMPILERS):
        if name and (found := shutil.which(name)):
            return found
    raise BuildError("there is no C++ compiler (on Debian: apt-get install g++)")


def load(
    cache_dir: Path,
    *,
    flags: tuple[str, ...] = (),
    compiler: str | None = None,
    sources: tuple[Path, ...] = SOURCES,
) -> ctypes.CDLL:
    """The library, built unless `cache_dir` holds it already.

    The file's name has a digest of all it was made from and for (source, flags, compiler and the CPU's features) and
    one of what is in it: a file that is damaged is built anew. Any number of processes may do this at the same time:
    each builds beside the target and renames.

    Args:
        cache_dir: must be trusted: what lies there is run. Where nothing can be written to it, the library is built in
            a folder of this process.
        flags: for the compiler, after the usual ones.
        sources: what to build; a part of it is built sooner.

    Raises:
        BuildError: no compiler, or it failed, or what it made cannot be loaded.
    """
    compiler = compiler or find_compiler()
    reason = ""
    with _LOCK:
        for recipe in RECIPES:
            try:
                library = _load(cache_dir, compiler, recipe, flags, sources)
                log.info("native kernels: %s, %s", compiler, recipe.name)
                return library
            except (BuildError, OSError) as error:
                reason = str(error)
                log.debug("native kernels, %s: %s", recipe.name, reason)
    raise BuildError(reason)


def _load(
    cache_dir: Path, compiler: str, recipe: Recipe, flags: tuple[str, ...], sources: tuple[Path, ...]
) -> ctypes.CDLL:
    options = (*_FLAGS, *recipe.compile, *flags)
    texts = [source.read_text(encoding="utf-8") for source in (*sources, *HEADERS)]
    made_from = (texts, options, recipe.link, _run([compiler, "--version"]), _cpu())
    digest = hashlib.sha256(repr(made_from).encode()).hexdigest()[:20]
    folder = cache_dir / "kernels"
    path = _sound(folder, digest)
    if path is None:
        with _scratch_in(folder) as scratch:
            linked = Path(scratch, "native.so")
            made = [str(Path(scratch, f"{source.stem}.o")) for source in sources]
            commands = ([compiler, *options, "-c", str(s), "-o", into] for s, into in zip(sources, made, strict=True))
            with ThreadPoolExecutor() as pool:
                list(pool.map(_run, commands))
            _run([compiler, "-shared", *recipe.link, *made, "-o", str(linked)])
            path = Path(scratch).parent / f"native-{digest}-{_content(linked)}.so"
            with linked.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(linked, path)
    return ctypes.CDLL(str(path))


def _sound(folder: Path, digest: str) -> Path | None:
    """The library that was built before, unless it is damaged: loading half of one ends the process."""
    for path in folder.glob(f"native-{digest}-*.so"):
        if path.stem.rpartition("-")[2] == _content(path):
            return path
        log.warning("%s is damaged and is built anew", path.name)
        with suppress(OSError):
            path.unlink()
    return None


def _content(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _scratch_in(folder: Path) -> tempfile.TemporaryDirectory[str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=folder)
    except OSError as error:
        log.warning("native kernels cannot be kept in %s, so each start builds them: %s", folder, error.strerror)
        return tempfile.TemporaryDirectory(dir=own_folder().name)


@cache
def own_folder() -> tempfile.TemporaryDirectory[str]:
    """Of this process alone: what lies there is run, so it must not be a place where others may write."""
    return tempfile.TemporaryDirectory(prefix="switchyard-kernels-")


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=True)
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{Path(command[0]).name} failed: {_first_error(error.stderr)}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{Path(command[0]).name} cannot be run: {error}") from error
    return done.stdout


def _first_error(said: str) -> str:
    lines = said.strip().splitlines()
    return next((line for line in lines if "error" in line), lines[-1] if lines else "it does not say why")


def _cpu() -> str:
    """What `-march=native` depends on: a cache folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
    kept = {line for line in lines if line.startswith(("flags", "Features", "model", "CPU part", "cpu family"))}
    return "\n".join(sorted(kept))
