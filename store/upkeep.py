"""Whole stores: check every byte, repair what can be repaired, and copy one store into another."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from store.alias import Alias, parse_entry
from store.backends import ABSENT, BlobStore, Health
from store.backends.copying import copy_blob
from store.errors import ConflictError, ExpertUnavailableError, StoreError
from store.garbage import collect, used_in
from store.record import ExpertRecord


class Verdict(Enum):
    """What is the matter with one expert, or one blob that belongs to none."""

    SOUND = "sound"
    HEALED = "healed"
    """Its bytes were damaged; they have been made anew from another copy."""
    DAMAGED = "damaged"
    """Its bytes are not what they were, and there is no other copy: upload it again."""
    GONE = "gone"
    """Its bytes are not there: upload it again."""
    UNREADABLE = "unreadable"
    """Its record is damaged: upload it again."""
    DANGLING = "points to nothing"
    """An alias whose expert is not there: remove it, or upload the expert."""
    IDLE = "idle"
    """A blob that belongs to no record: garbage, once its grace period is over (`store.garbage`)."""

    @property
    def is_fault(self) -> bool:
        """Whether something is left for somebody to do."""
        return self not in (Verdict.SOUND, Verdict.HEALED, Verdict.IDLE)


@dataclass(frozen=True)
class Finding:
    """The verdict on `subject`: an expert's name, or a digest."""

    subject: str
    verdict: Verdict


def verify(store: BlobStore, *, repair: bool = False) -> Iterator[Finding]:
    """Read every byte of a store, which may be in use, and say what is wrong, expert by expert.

    Args:
        repair: heal damaged bytes from another copy where there is one.

    Raises:
        StoreError: the store failed.
    """
    checked: dict[str, Health] = {}
    records = store.records()
    for name, data in records.items():
        record = parse_entry(name, data)
        if record is None:
            yield Finding(name, Verdict.UNREADABLE)
            continue
        if isinstance(record, Alias):
            yield Finding(name, Verdict.SOUND if record.target in records else Verdict.DANGLING)
            continue
        for digest in sorted(record.blobs - checked.keys()):
            checked[digest] = store.verify(digest, repair=repair)
        worst = max((checked[digest] for digest in record.blobs), key=_SEVERITY.index)
        if worst in (Health.DAMAGED, Health.GONE) and store.get_record(name) != data:
            continue  # replaced or removed since it was listed
        yield Finding(name, Verdict(worst.value))
    for idle in collect(store, lambda: used_in(store), math.inf, dry_run=True):
        yield Finding(idle.digest, Verdict.IDLE)


def migrate(source: BlobStore, target: BlobStore) -> Iterator[tuple[str, bool]]:
    """Copy every expert into another store, one at a time: each is there as a whole or not at all.

    May be interrupted and called again; what is there already is not copied twice.

    Yields:
        Names, and whether the expert had to be copied.

    Raises:
        ConflictError: the target has another expert of that name.
        ExpertUnavailableError: an expert's record or bytes are damaged; `verify` says which others are.
        StoreError: a store failed.
    """
    entries = [(parse_entry(name, data), name, data) for name, data in source.records().items()]
    for entry, name, data in sorted(entries, key=lambda item: isinstance(item[0], Alias)):  # experts first
        if entry is None:
            raise ExpertUnavailableError(f"the record of {name} is damaged: remove the expert or upload it again")
        with target.exclusive():
            present = target.get_record(name)
            if present == data:
                yield name, False
                continue
            if present is not None:
                raise ConflictError(f"the target has another expert named {name}: remove one of the two", param="name")
            there = target.blobs()
            for digest in sorted(entry.blobs) if isinstance(entry, ExpertRecord) else ():
                if digest not in there or target.verify(digest, repair=False) is not Health.SOUND:
                    copy_blob(source, target, digest)
            if not target.put_record(name, data, expected=ABSENT):
                raise StoreError("the target let another writer in")
        yield name, True


_SEVERITY = [Health.SOUND, Health.HEALED, Health.DAMAGED, Health.GONE]
