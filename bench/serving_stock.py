"""Experts for `bench.serving`: random, in all matrices of the decoder's layers, in a store of files as a server's."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from examples.fetch import CACHE
from store.backends.disk import DiskStore
from store.codecs.base import ternary
from store.expert_file import ExpertInfo, digest_of, write_expert
from store.fingerprint import manifest_of
from store.manifest import BaseManifest
from store.mix import Mix
from store.packed import PackedTernary


@dataclass(frozen=True)
class Stock:
    """Expert files by density.

    Attributes:
        digests: density → the digests of its experts.
    """

    store: DiskStore
    digests: dict[float, list[str]]

    def mixes(self, density: float) -> list[Mix]:
        """One mix of each expert alone."""
        return [Mix.of({digest: 1.0}) for digest in self.digests[density]]

    def names(self, density: float) -> list[str]:
        """What their files call them."""
        return [_name(density, number) for number in range(len(self.digests[density]))]

    def path(self, digest: str) -> Path:
        return self.store.fetch(digest)


def forget(path: Path) -> None:
    """Have the kernel forget a file, so that the next one to read it reads the disk."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def stock(base: Path, folder: Path, densities: tuple[float, ...], count: int) -> Stock:
    """Write `count` experts of each density; those of one density hold the same figures and have names of their own,
    so that nothing but their digests and their memory differs."""
    store, manifest = DiskStore(folder), manifest_of(base, CACHE.parent)
    digests: dict[float, list[str]] = {}
    for density in densities:
        tensors = random_tensors(manifest, density)
        for number in range(count):
            path = store.quarantine() / f"{number}.safetensors"
            info = ExpertInfo(codec="t-switch", tool="bench.serving", name=_name(density, number))
            write_expert(path, info, tensors, manifest)
            digests.setdefault(density, []).append(digest_of(path))
            store.put_blob(path, digests[density][-1])
    return Stock(store, digests)


def random_tensors(manifest: BaseManifest, density: float, *, only: str = ".layers.") -> dict[str, PackedTernary]:
    """Ternary deltas of that density for the matrices whose names contain `only`."""
    rng = np.random.default_rng(0)
    found = {}
    for name, shape in manifest.tensors.items():
        if len(shape) == 2 and only in name:
            indices = np.flatnonzero(rng.random(shape[0] * shape[1], dtype=np.float32) < density)
            found[name] = ternary(name, tuple(shape), indices, rng.random(len(indices)) < 0.5, 1e-3)
    return found


def _name(density: float, number: int) -> str:
    return f"random-{1000 * density:.0f}-{number}"
