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
from dataclasses import dataclass
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

    The file's name is a digest of all it was made from and for: source, flags, compiler and the CPU's features. Any
    number of processes may do this at the same time: each builds beside the target and renames.

    Args:
        cache_dir: must be trusted: what lies there is run.
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
    path = cache_dir / "kernels" / f"native-{digest}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            linked = Path(scratch, "native.so")
            made = [str(Path(scratch, f"{source.stem}.o")) for source in sources]
            commands = ([compiler, *options, "-c", str(s), "-o", into] for s, into in zip(sources, made, strict=True))
            with ThreadPoolExecutor() as pool:
                list(pool.map(_run, commands))
            _run([compiler, "-shared", *recipe.link, *made, "-o", str(linked)])
            os.replace(linked, path)
    return ctypes.CDLL(str(path))


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
