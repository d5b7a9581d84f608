"""Publish and remove experts in a store until killed: `python -m tests.store.publish_forever STORE SAMPLES SEED`."""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path

from store.backends.disk import DiskStore
from store.registry import Registry
from tests.store.builders import base_manifest


def main(root: Path, samples: Path, seed: int) -> None:
    rng = random.Random(seed)
    store = DiskStore(root)
    registry = Registry(store, base_manifest(), frozenset())
    files = sorted(samples.iterdir())
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        name = f"expert-{rng.randrange(4)}"
        if any(record.name == name for record in registry.list()):
            registry.remove(name)
        else:
            upload = store.quarantine() / f"upload-{rng.randrange(10**9)}"
            shutil.copy(rng.choice(files), upload)
            registry.publish(upload, name=name, exemplars=[f"exemplar {rng.randrange(3)}"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
