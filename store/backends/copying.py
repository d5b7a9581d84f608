"""A blob of one store into another, or into the same one again."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from store.backends import BlobStore
from store.backends.filesystem import reported


def copy_blob(source: BlobStore, target: BlobStore, digest: str) -> None:
    """Copy a blob through the target's quarantine, which takes it over.

    Raises:
        StoreError: either store fails; nothing half copied is left.
        ExpertUnavailableError: the source has no sound copy.
    """
    path: Path | None = None
    try:
        with reported(f"copy {digest[:12]}…"):
            with tempfile.NamedTemporaryFile(dir=target.quarantine(), prefix="copy-", delete=False) as file:
                path = Path(file.name)
            shutil.copyfile(source.fetch(digest), path)
            target.put_blob(path, digest)
    finally:
        if path is not None:
            with suppress(OSError):
                path.unlink(missing_ok=True)
