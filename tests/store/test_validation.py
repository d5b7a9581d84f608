"""Files are checked where they can do no harm: what a hostile one costs is its own check."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from store.errors import ExpertFileError, StoreError, WrongBaseError
from store.expert_file import validate
from store.manifest import BaseManifest
from store.validation import Limits, Validator, limits_for
from tests.store.builders import base_manifest, packed_newer, write_sample

EVIL = "tests.store.evil_checker"
LIMITS = Limits(cpu_seconds=1, wall_seconds=60, memory=1 << 30)


@pytest.fixture(scope="module")
def validator() -> Iterator[Validator]:
    validator = Validator(base_manifest(), LIMITS, module=EVIL)
    yield validator
    validator.close()


def said(error: ExpertFileError) -> tuple[str, str | None, str]:
    return error.message, error.param, error.code


def test_sound_files(validator: Validator, tmp_path: Path) -> None:
    for seed, tensors in ((1, None), (2, packed_newer(2))):
        path = write_sample(tmp_path / "sample", seed, tensors, name="x")
        assert validator.check(path) == validate(path, base_manifest())


def test_unsound_files_are_refused_in_the_same_words(validator: Validator, tmp_path: Path) -> None:
    sound = write_sample(tmp_path / "sample").read_bytes()
    for bad in (b"", b"junk", sound[:-1], sound[:40], sound + b"x", sound[:-8] + b"\xff" * 8):
        (tmp_path / "bad").write_bytes(bad)
        with pytest.raises(ExpertFileError) as here:
            validate(tmp_path / "bad", base_manifest())
        with pytest.raises(ExpertFileError) as there:
            validator.check(tmp_path / "bad")
        assert said(there.value) == said(here.value)


def test_another_base(validator: Validator, tmp_path: Path) -> None:
    other = Validator(base_manifest(7))
    with pytest.raises(WrongBaseError, match="was made for the base"):
        other.check(write_sample(tmp_path / "sample"))
    other.close()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("burn ", "1 s of processor time"),
        ("crash", "crash"),
        ("raise", "crash"),
        ("alloc", "1024 MiB of memory"),
        ("write", "crash"),
    ],
)
def test_hostile_files_are_refused_and_the_next_one_is_served(
    validator: Validator, tmp_path: Path, word: str, message: str
) -> None:
    (tmp_path / "evil").write_text(word)
    with pytest.raises(ExpertFileError, match=message) as refused:
        validator.check(tmp_path / "evil")
    assert refused.value.code == "check_failed"
    assert validator.check(write_sample(tmp_path / "sample"))


def test_time_is_limited_too(tmp_path: Path) -> None:
    hasty = Validator(base_manifest(), Limits(cpu_seconds=60, wall_seconds=1, memory=1 << 30), module=EVIL)
    (tmp_path / "evil").write_text("sleep")
    with pytest.raises(ExpertFileError, match="more than 1 s"):
        hasty.check(tmp_path / "evil")
    hasty.close()


def test_a_checker_that_was_killed_is_started_again(validator: Validator, tmp_path: Path) -> None:
    sample = write_sample(tmp_path / "sample")
    assert validator.check(sample)
    assert validator._process is not None
    validator._process.send_signal(signal.SIGKILL)
    validator._process.wait()
    assert validator.check(sample)
    (tmp_path / "evil").write_text("death")
    with pytest.raises(StoreError, match="try again"):
        validator.check(tmp_path / "evil")
    assert validator.check(sample)


def test_many_at_once(validator: Validator, tmp_path: Path) -> None:
    samples = [write_sample(tmp_path / f"sample-{i}", i, name=f"n{i}") for i in range(4)]
    (tmp_path / "evil").write_text("sleep")
    names: list[str | None] = []

    def check(path: Path) -> None:
        names.append(validator.check(path).name)

    def refuse(path: Path) -> None:
        with pytest.raises(ExpertFileError):
            validator.check(path)

    threads = [threading.Thread(target=check, args=[path]) for path in samples * 3]
    slow = threading.Thread(target=refuse, args=[tmp_path / "evil"])
    for thread in [slow, *threads]:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(filter(None, names)) == sorted([f"n{i}" for i in range(4)] * 3)
    assert slow.is_alive(), "nobody waited for it"
    slow.join()


def test_nothing_is_left_open(validator: Validator, tmp_path: Path) -> None:
    sample = write_sample(tmp_path / "sample")
    validator.check(sample)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        validator.check(sample)
    assert len(os.listdir("/proc/self/fd")) == before
    assert validator._process is not None
    assert len(os.listdir(f"/proc/{validator._process.pid}/fd")) < 8


def test_a_server_with_many_connections_checks_all_the_same(validator: Validator, tmp_path: Path) -> None:
    sample = write_sample(tmp_path / "sample")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip("so many descriptors are not allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    held = [os.open(os.devnull, os.O_RDONLY)]
    try:
        held += [os.dup(held[0]) for _ in range(1030)]
        assert validator.check(sample)
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_limits_grow_with_the_base() -> None:
    small, large = (limits_for(BaseManifest("0" * 64, {"w": (n, 4096)})) for n in (1, 1 << 18))
    assert small.memory >= 1 << 30
    assert large.memory >= 8 * (1 << 18) * 4096, "a dense tensor of float32, and what it is made from"
    assert large.cpu_seconds > small.cpu_seconds


def test_the_checker_needs_no_torch() -> None:
    code = "import sys, store.checker; sys.exit('torch' in sys.modules or 'fastapi' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
