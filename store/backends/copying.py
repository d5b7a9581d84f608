"""A blob of one store into another, or into the same one again."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from store.backends import BlobStore
from store.errors import StoreError


def copy_blob(source: BlobStore, target: BlobStore, digest: str) -> None:
    """Copy a blob through the target's quarantine, which takes it over.

    Raises:
        StoreError: either store fails.
    """
    with tempfile.NamedTemporaryFile(dir=target.quarantine(), prefix="copy-", delete=False) as file:
        path = Path(file.name)
    try:
        shutil.copyfile(source.fetch(digest), path)
        target.put_blob(path, digest)
    except OSError as error:
        raise StoreError(f"cannot copy {digest[:12]}…: {error.strerror}") from error
    finally:
        path.unlink(missing_ok=True)
