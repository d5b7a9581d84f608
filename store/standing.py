"""A base with experts on it as a checkpoint of its own: what an expert that stands on them is compressed against."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from store.checkpoint import Checkpoint, open_checkpoint
from store.errors import InvalidRequestError, StorageFullError, StoreError
from store.expert_file import digest_of, read_deltas, read_header
from store.fine_tune import write_float32
from store.intake import FULL
from store.manifest import BaseManifest
from store.overwriting import as_float_delta


def chain_of(files: Sequence[Path]) -> list[Path]:
    """The expert of the first file and what it stands on, nearest first.

    Args:
        files: the expert, and all that it stands on, in any order; at least one.

    Raises:
        ExpertFileError: one is no expert file.
        InvalidRequestError: one is missing, or too many; `param` is "relative_to".
    """
    by_digest = {digest_of(file): file for file in files}
    chain = [files[0]]
    while (below := read_header(chain[-1]).relative_to) is not None:
        if below not in by_digest:
            raise InvalidRequestError(
                f"{chain[-1].name} stands on the expert {below[:12]}…: give that file too", param="relative_to"
            )
        chain.append(by_digest[below])
    if spare := [file.name for file in by_digest.values() if file not in chain]:
        raise InvalidRequestError(f"{files[0].name} does not stand on {spare[0]}", param="relative_to")
    return chain


@contextmanager
def standing_on(base: Checkpoint, manifest: BaseManifest, chain: Sequence[Path]) -> Iterator[Checkpoint]:
    """The base + Σ deltas of a chain as a float32 checkpoint, for the length of the context; the base for an empty one.

    Raises:
        ExpertFileError, WrongBaseError: as `read_deltas`.
        StoreError: there is no room for it.
    """
    if not chain:
        yield base
        return
    with tempfile.TemporaryDirectory(prefix="switchyard-standing-") as folder:
        try:
            _write(base, manifest, chain, Path(folder))
        except OSError as error:
            kind = StorageFullError if error.errno in FULL else StoreError
            raise kind(f"cannot put the experts on a copy of the base: {error.strerror}") from None
        yield open_checkpoint(Path(folder))


def _write(base: Checkpoint, manifest: BaseManifest, chain: Sequence[Path], folder: Path) -> None:
    layers = [dict(read_deltas(file, manifest)) for file in chain]

    def added(name: str, weight: torch.Tensor) -> torch.Tensor:
        for deltas in layers:
            if name in deltas:
                weight = weight + torch.from_numpy(as_float_delta(deltas[name], base, name)).view(weight.shape)
        return weight

    write_float32(base, added, folder)
