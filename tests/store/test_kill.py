"""Kill a process that changes the store, at any instant: what it acknowledged is there, the rest is whole or absent."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from store.expert_file import digest_of
from store.registry import Registry
from tests.store.builders import base_manifest, write_sample
from tests.store.publish_forever import NAMES, open_store


@pytest.mark.parametrize(
    ("backend", "kills"),
    [
        ("disk", 200),
        ("redis", 10),
        pytest.param("redis", 200, marks=pytest.mark.slow),
    ],
)
def test_kill_minus_nine_at_any_instant(
    tmp_path: Path, request: pytest.FixtureRequest, backend: str, kills: int
) -> None:
    address = str(tmp_path / "store") if backend == "disk" else request.getfixturevalue("shared_redis").url
    samples, log = tmp_path / "samples", tmp_path / "log"
    samples.mkdir()
    digests = {}
    for seed in range(3):
        path = write_sample(samples / f"sample-{seed}", seed)
        digests[path.name] = digest_of(path)
    rng = random.Random(kills)
    command = [sys.executable, "-m", "tests.store.publish_forever", address, str(samples), str(log)]
    acknowledged: dict[str, str] = {}
    changes, read = 0, 0
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2], text=True, bufsize=1
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for kill in range(kills):
            process.stdin.write(f"{kill}\n")
            child = int(process.stdout.readline())
            try:
                if kill % 3:  # else while the store is opened
                    _until_it_has_said(log, read + rng.randrange(1, 8))
                time.sleep(rng.uniform(0.0, 0.03))
            finally:
                os.kill(child, signal.SIGKILL)
            assert int(process.stdout.readline()) == -signal.SIGKILL
            tried: dict[str, set[str]] = {}
            lines = log.read_text().splitlines() if log.exists() else []
            for line in lines[read:]:
                word, name, what = line.split()
                if word == "try":
                    tried.setdefault(name, set()).add(what)
                else:
                    acknowledged[name] = what
                    del tried[name]
                    changes += 1
            read = len(lines)
            _check(address, tmp_path / "reader", digests, acknowledged, tried)
        process.stdin.close()
    assert changes > kills / 2


def _until_it_has_said(log: Path, lines: int) -> None:
    deadline = time.monotonic() + 60
    while not log.exists() or log.read_bytes().count(b"\n") < lines:
        assert time.monotonic() < deadline, "it does nothing"
        time.sleep(0.001)


def _check(
    address: str, cache: Path, digests: dict[str, str], acknowledged: dict[str, str], tried: dict[str, set[str]]
) -> None:
    store = open_store(address, cache)
    if "://" not in address:
        assert [path.name for path in (Path(address) / "quarantine").iterdir()] == [store.quarantine().name]
    registry = Registry(store, base_manifest(), frozenset())
    records = {record.name: record for record in registry.list()}
    assert records.keys() == store.records().keys(), "no record is damaged"
    for name in NAMES:
        there = records[name].digest if name in records else None
        allowed = {digests.get(what) for what in {acknowledged.get(name, "-"), *tried.get(name, ())}}
        assert there in allowed, f"{name} is not what was acknowledged"
        # What the killed child had not heard an answer to is decided now.
        acknowledged[name] = next((sample for sample, digest in digests.items() if digest == there), "-")
    registry.collect_garbage(0)
    for record in records.values():
        assert digest_of(registry.expert_path(record.digest)) == record.digest
        assert registry.exemplars(record)
    assert store.blobs() == set().union(*(record.blobs for record in records.values())), "no garbage is left"
    store.close()
