"""What a store's medium has lost and this machine still has, put back."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path

from store.backends import ABSENT, BlobStore
from store.errors import ExpertUnavailableError, StoreError
from store.record import parse_record

_log = logging.getLogger(__name__)


def restore_lost(store: BlobStore) -> None:
    """Put back what the store's medium has lost, where its bytes are still on this machine; give up the rest.

    Raises:
        StoreError: the store failed; what is left is tried again by the next call.
    """
    for name, data in store.lost().items():
        record = parse_record(name, data)
        with store.exclusive():
            try:
                for digest in record.blobs if record is not None else ():
                    _put_again(store, digest)
            except ExpertUnavailableError:
                _log.error("the expert %s is lost: its bytes are nowhere; upload it again", name)
                store.delete_record(name)
                continue
            if store.put_record(name, data, expected=ABSENT):
                _log.warning("the expert %s was lost by the store and has been put back", name)


def _put_again(store: BlobStore, digest: str) -> None:
    with tempfile.NamedTemporaryFile(dir=store.quarantine(), delete=False) as copy:
        path = Path(copy.name)
    try:
        shutil.copyfile(store.fetch(digest), path)
        store.put_blob(path, digest)
    except OSError as error:
        raise StoreError(f"cannot copy the file: {error.strerror}") from error
    finally:
        path.unlink(missing_ok=True)
