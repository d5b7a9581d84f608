"""Blobs that no record names: kept for a grace period, then removed.

Requests that run on a version which was replaced or removed can finish, a removal by mistake can be undone by uploading
again at no cost, and a blob that somebody is about to name is never taken away: who publishes holds the store from the
first blob to the record, and who collects holds it from looking to deleting.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from store.alias import parse_entry
from store.backends import BlobStore
from store.record import ExpertRecord

_AT_ONCE = 64
"""Blobs deleted while the store is held once: publications get a word in between."""

Used = Callable[[], Collection[str] | None]
"""Digests of the blobs that records name, as of now; None where a damaged record may name any."""


@dataclass(frozen=True)
class Idle:
    """A blob that no record names.

    Attributes:
        digest: hex sha256.
        bytes: its size; 0 if it was never finished.
        seconds: for how long that has been known.
        is_due: whether its grace period is over.
    """

    digest: str
    bytes: int
    seconds: float
    is_due: bool


def collect(store: BlobStore, used: Used, grace: float, *, dry_run: bool = False) -> list[Idle]:
    """Remove what has been idle for the grace period, and note since when the rest is.

    Args:
        grace: seconds; 0 removes at once.
        dry_run: change nothing, only look.

    Returns:
        All that was idle, what is removed now included.

    Raises:
        StoreError: the store failed; what was removed until then is gone, the rest is left to the next call.
    """
    with store.exclusive():
        idle = _look(store, used, grace)
        known = store.idle()
        if not dry_run:
            store.note_idle({one.digest for one in idle} - known.keys())
            store.forget_idle(known.keys() - {one.digest for one in idle})
    due = iter([] if dry_run else [one.digest for one in idle if one.is_due])
    while batch := list(itertools.islice(due, _AT_ONCE)):
        with store.exclusive():
            # A record may have come to name one of them meanwhile, or have left it only now.
            known = store.idle()
            for digest in [one for one in _idle_of(used, batch) if known.get(one, 0.0) >= grace]:
                store.delete_blob(digest)
                store.forget_idle({digest})
    return idle


def release(store: BlobStore, used: Used, digests: Collection[str]) -> None:
    """Start the grace period of those of the blobs that no record names any more. The store is held."""
    store.note_idle(_idle_of(used, digests))


def used_by(records: Iterable[ExpertRecord]) -> set[str]:
    """Digests of the blobs that these records name."""
    return set().union(*(record.blobs for record in records))


def used_in(store: BlobStore) -> set[str] | None:
    """`Used`, by reading all records of a store."""
    entries = [parse_entry(name, data) for name, data in store.records().items()]
    return None if None in entries else used_by(entry for entry in entries if isinstance(entry, ExpertRecord))


def _look(store: BlobStore, used: Used, grace: float) -> list[Idle]:
    known = store.idle()
    found = []
    for digest in sorted(_idle_of(used, store.blobs())):
        seconds = known.get(digest, 0.0)
        found.append(Idle(digest, store.blob_bytes(digest) or 0, seconds, seconds >= grace))
    return found


def _idle_of(used: Used, digests: Collection[str]) -> set[str]:
    named = used()
    return set() if named is None else set(digests).difference(named)
