"""Change a store until killed, again and again: `python -m tests.store.publish_forever STORE SAMPLES LOG`.

For every line on its input, a seed, this forks a child that publishes, replaces and removes at random, and answers
with the child's process id; forking takes milliseconds where starting Python takes a second. A child writes to LOG
what it is about to do and what was acknowledged.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
from contextlib import suppress
from pathlib import Path

from store.backends import BlobStore
from store.backends.disk import DiskStore
from store.backends.redis import RedisStore
from store.errors import StoreUnavailableError
from store.registry import Registry
from tests.store.builders import base_manifest

NAMES = [f"expert-{i}" for i in range(4)]


def open_store(address: str, cache: Path) -> BlobStore:
    if "://" in address:
        return RedisStore(address, cache, cache_bytes=1 << 30, lease_seconds=1.0)
    return DiskStore(Path(address))


def work(address: str, samples: Path, log: int, seed: int) -> None:
    """Never returns."""
    rng = random.Random(seed)
    store = open_store(address, samples.parent / "cache")
    registry = Registry(store, base_manifest(), frozenset())
    files = sorted(samples.iterdir())
    while True:
        with suppress(StoreUnavailableError):  # on a busy machine a lease may run out
            change(registry, store, rng, files, log)


def change(registry: Registry, store: BlobStore, rng: random.Random, files: list[Path], log: int) -> None:
    """One change at random; now and then a collection of what the others have left."""
    if rng.random() < 0.1:
        registry.collect_garbage(0)
    name, file = rng.choice(NAMES), rng.choice(files)
    there = {record.name for record in registry.list()}
    if name in there and rng.random() < 0.5:
        os.write(log, f"try {name} -\n".encode())
        registry.remove(name)
        os.write(log, f"did {name} -\n".encode())
    else:
        upload = store.quarantine() / f"upload-{rng.randrange(10**9)}"
        shutil.copy(file, upload)
        os.write(log, f"try {name} {file.name}\n".encode())
        registry.publish(upload, name=name, exemplars=[f"exemplar {rng.randrange(3)}"], replace=True)
        os.write(log, f"did {name} {file.name}\n".encode())


def main(address: str, samples: Path, log: Path) -> None:
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                work(address, samples, os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), int(line))
            finally:
                os._exit(1)
        sys.stdout.write(f"{child}\n")
        sys.stdout.flush()
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
