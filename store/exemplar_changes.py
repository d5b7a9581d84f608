"""Other exemplars for a published expert: a blob of their own beside its file, which stays as it is."""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from store.backends import BlobStore
from store.backends.filesystem import reported
from store.exemplars import exemplar_bytes
from store.expert_file import read_header
from store.record import ExpertRecord

Present = Callable[[], Sequence[str]]
"""Reads the exemplars of an expert as they are; who replaces damaged ones need not."""
Choice = Callable[[Present], Sequence[str] | None]
"""What the exemplars of an expert shall be; None: those of its file's header."""


def put_exemplars(store: BlobStore, data: bytes) -> str:
    """Keep what `exemplar_bytes` gave. Returns the digest of its blob, which no record names yet.

    Raises:
        StoreError: it cannot be written; nothing of it is left in the quarantine.
    """
    digest = hashlib.sha256(data).hexdigest()
    path: Path | None = None
    try:
        with reported("store the exemplars"):
            with tempfile.NamedTemporaryFile(dir=store.quarantine(), prefix="exemplars-", delete=False) as file:
                path = Path(file.name)
                file.write(data)
            store.put_blob(path, digest)
    finally:
        if path is not None:  # on a disk that is full, what was written of it is in the way
            with suppress(OSError):
                path.unlink(missing_ok=True)
    return digest


def exemplified(
    store: BlobStore, record: ExpertRecord, choose: Choice, read: Callable[[ExpertRecord], Sequence[str]]
) -> ExpertRecord:
    """The record with other exemplars, which are in the store when this returns. The store is held.

    Args:
        read: its exemplars as they are.

    Raises:
        InvalidRequestError, TooLargeError: they are none that could be uploaded; `param` is "exemplars".
        ExpertUnavailableError: the file is gone or damaged.
        StoreError: they cannot be written.
    """
    chosen = choose(lambda: read(record))
    own = read_header(store.fetch(record.digest)).exemplars
    wanted = list(own) if chosen is None else list(dict.fromkeys(chosen))
    if tuple(wanted) == own:
        return dataclasses.replace(record, exemplar_count=len(own), exemplars_digest=None)
    digest = put_exemplars(store, exemplar_bytes(wanted))
    return dataclasses.replace(record, exemplar_count=len(wanted), exemplars_digest=digest)
