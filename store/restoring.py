"""What a store's medium has lost and this machine still has, put back."""

from __future__ import annotations

import logging

from store.alias import Alias, parse_entry
from store.backends import ABSENT, BlobStore
from store.backends.copying import copy_blob
from store.errors import ExpertUnavailableError
from store.record import ExpertRecord

_log = logging.getLogger(__name__)


def restore_lost(store: BlobStore) -> None:
    """Put back what the store's medium has lost, where its bytes are still on this machine; give up the rest.

    Raises:
        StoreError: the store failed; what is left is tried again by the next call.
    """
    lost = [(parse_entry(name, data), name, data) for name, data in store.lost().items()]
    for entry, name, data in sorted(lost, key=lambda item: isinstance(item[0], Alias)):  # experts first
        with store.exclusive():
            try:
                if isinstance(entry, Alias) and store.get_record(entry.target) is None:
                    raise ExpertUnavailableError("its expert is lost")
                for digest in entry.blobs if isinstance(entry, ExpertRecord) else ():
                    copy_blob(store, store, digest)
            except ExpertUnavailableError:
                _log.error("%s is lost: its bytes are nowhere; upload it again", name)
                store.delete_record(name)
                continue
            if store.put_record(name, data, expected=ABSENT):
                _log.warning("%s was lost by the store and has been put back", name)
