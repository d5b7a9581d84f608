"""How experts come, change and go: every change of a store's catalogue."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from store.backends import ABSENT, BlobStore, Expect
from store.catalogue import Catalogue
from store.errors import (
    ExpertFileError,
    ExpertUnavailableError,
    InvalidRequestError,
    NotFoundError,
    StoreError,
    StoreUnavailableError,
)
from store.exemplars import exemplar_bytes, parse_exemplars
from store.expert_file import digest_of, read_header, validate
from store.expert_header import ExpertHeader
from store.expert_info import NAME_PATTERN
from store.garbage import Idle, collect, release, used_by
from store.manifest import BaseManifest
from store.record import KEPT_VERSIONS, ExpertRecord, check_record, check_same, parse_record, record_to_json
from store.restoring import restore_lost
from store.tiers import TierStats


class Registry(Catalogue):
    """The experts of one base in a store, and all that changes them. Thread-safe, over all processes.

    Args:
        store: where the bytes are.
        base: what experts are checked against.
        reserved: names no expert may take: the base's own, "auto".

    Raises:
        StoreError: the store cannot be read.
    """

    def __init__(self, store: BlobStore, base: BaseManifest, reserved: frozenset[str]) -> None:
        super().__init__(store, base)
        self._reserved = reserved

    def publish(
        self,
        path: Path,
        *,
        name: str | None = None,
        exemplars: Sequence[str] | None = None,
        replace: bool = False,
        header: ExpertHeader | None = None,
        digest: str | None = None,
    ) -> tuple[ExpertRecord, bool]:
        """Validate a quarantined file and publish it; live at once, durable on return.

        Args:
            path: the file, in the store's quarantine. Gone on return; on an error the caller deletes it if it is there.
            name: what to call it; None takes the name in its header, or "expert-" and 12 digits of its digest.
            exemplars: prompts that win over those in its header; None leaves them as they are.
            replace: let the name point to this file, whatever it points to; that becomes its latest earlier version.
            header, digest: of a file that was validated and hashed since it came; None for doing so now.

        Returns:
            The record, and whether anything is new. Publishing what is already there is no error.

        Raises:
            ExpertFileError, WrongBaseError: the file is not a sound expert of this base.
            InvalidRequestError: the name is malformed or reserved (`param` is "name").
            ConflictError: the name belongs to another expert, or to this one with other exemplars.
            StoreError: the store failed; nothing half published is left, but an unacknowledged record may be.
        """
        header = validate(path, self._base) if header is None else header
        exemplars = None if exemplars is None else list(dict.fromkeys(exemplars))
        digest = digest_of(path) if digest is None else digest
        chosen = self._checked_name(name or header.name or f"expert-{digest[:12]}")
        own = None if exemplars is None or tuple(exemplars) == header.exemplars else exemplar_bytes(exemplars)
        record = ExpertRecord(
            name=chosen,
            digest=digest,
            bytes=path.stat().st_size,
            created=int(time.time()),
            base_fingerprint=header.base_fingerprint,
            codec=header.codec,
            density=header.density,
            bits_per_param=header.bits_per_param,
            description=header.description,
            exemplar_count=len(header.exemplars if exemplars is None else exemplars),
            exemplars_digest=hashlib.sha256(own).hexdigest() if own is not None else None,
            card=header.card,
        )
        with self._store.exclusive():
            present = self._store.get_record(chosen)
            existing = parse_record(chosen, present)
            before = existing.blobs if existing is not None else set()
            fresh = {blob for blob in record.blobs if self._store.blob_bytes(blob) is None}
            if existing is not None and replace and existing.differs(record, exemplars_given=exemplars is not None):
                record = dataclasses.replace(record, earlier=existing.versions[:KEPT_VERSIONS])
                existing = None
            elif existing is not None:
                check_same(existing, record, exemplars_given=exemplars is not None)
            try:
                # Blobs first: at no instant does a record lack its bytes.
                if own is not None and record.exemplars_digest is not None:
                    beside = path.with_name(f"{path.name}.exemplars")
                    _write(beside, own)
                    self._store.put_blob(beside, record.exemplars_digest)
                self._store.put_blob(path, digest)
            except StoreError:
                for blob in fresh:  # a store that is full needs the room
                    with suppress(StoreError):
                        self._store.delete_blob(blob)
                raise
            if existing is not None:  # its blobs are written all the same: that heals damaged ones
                return existing, False
            # Where this fails the record may have arrived, or arrive yet: its blobs are left to the next collection.
            self._put(record, ABSENT if present is None else present)
            if record.earlier:  # one of them may be one too many now
                self._release(before - record.blobs)
        return record, True

    def remove(self, name: str) -> ExpertRecord:
        """Unpublish an expert; its bytes go later, if no other name refers to them. Returns what it was.

        Raises:
            NotFoundError: there is none.
        """
        with self._store.exclusive():
            record = self._all().get(name) if name in self._store.lost() else self._held(name)[0]
            if record is None:
                raise NotFoundError(f"there is no expert named {name[:64]!r}", param="name")
            # The record first: a blob without a record is garbage, a record without its blob is a broken promise.
            self._store.delete_record(name)
            self._release(record.blobs)
        return record

    def roll_back(self, name: str, digest: str | None = None) -> ExpertRecord:
        """Let a name point to one of its earlier versions again; the present one becomes the latest earlier one.

        Args:
            digest: of the version; None takes the latest earlier one.

        Raises:
            NotFoundError: there is no such expert, or it has no such version.
        """
        with self._store.exclusive():
            record, present = self._held(name)
            wanted = next((one for one in record.earlier if digest in (None, one.digest)), None)
            if wanted is None:
                which = "earlier version" if digest is None else f"earlier version {digest[:12]}"
                raise NotFoundError(f"the expert {name} has no {which}", param="digest", code="version_not_found")
            self.expert_path(wanted.digest)  # raises where its bytes are gone or damaged
            rest = tuple(one for one in record.versions if one != wanted)
            changed = dataclasses.replace(wanted, earlier=rest)
            self._put(changed, present)
        return changed

    def describe(
        self,
        name: str,
        *,
        description: str | None = None,
        tags: Sequence[str] | None = None,
        metadata: Mapping[str, str | None] | None = None,
    ) -> ExpertRecord:
        """Change what is said about the present version of an expert; its file stays as it is.

        Args:
            description: in place of the present one; None leaves it.
            tags: in place of the present ones; None leaves them.
            metadata: entries to set, and with None to take away; others stay.

        Raises:
            NotFoundError: there is none.
            InvalidRequestError: something breaks a rule of the format; `param` says what.
        """
        with self._store.exclusive():
            record, present = self._held(name)
            card = record.card
            merged = {**card.metadata, **(metadata or {})}
            changed = dataclasses.replace(
                record,
                description=record.description if description is None else description,
                card=dataclasses.replace(
                    card,
                    tags=card.tags if tags is None else tuple(tags),
                    metadata={key: value for key, value in merged.items() if value is not None},
                ),
            )
            check_record(changed)
            if changed != record:
                self._put(changed, present)
        return changed

    def undo(self, record: ExpertRecord) -> None:
        """Take back a publication that nobody has been told of: its name points to what it pointed to before.

        Nothing happens if somebody else has changed the name since.
        """
        with self._store.exclusive():
            present = self._store.get_record(record.name)
            if present is None or parse_record(record.name, present) != record:
                return
            if record.earlier:
                former = record.earlier[0]
                self._put(dataclasses.replace(former, earlier=record.earlier[1:]), present)
            else:
                self._store.delete_record(record.name)
            self._release(record.blobs)

    def exemplars(self, record: ExpertRecord) -> Sequence[str]:
        """The prompts that tell what an expert is for: those uploaded beside it, else those of its header.

        Raises:
            ExpertUnavailableError: its bytes are gone or damaged.
        """
        try:
            if record.exemplars_digest is None:
                return list(read_header(self.expert_path(record.digest)).exemplars)
            return parse_exemplars(self._store.fetch(record.exemplars_digest).read_bytes())
        except (OSError, ExpertFileError):  # it was verified: it can only have been removed since
            raise ExpertUnavailableError(f"the expert {record.name} was removed") from None

    def expert_path(self, digest: str) -> Path:
        """A local file with the verified bytes of an expert.

        Raises:
            ExpertUnavailableError: they are gone or damaged.
        """
        return self._store.fetch(digest)

    def expert_bytes(self, digest: str) -> bytes:
        """Exactly the bytes of an expert's file: what was hashed is what is returned.

        Raises:
            ExpertUnavailableError: they are gone or damaged.
        """
        return self._store.read(digest)

    def tiers(self) -> tuple[TierStats, ...]:
        """What the store's tiers have done."""
        return self._store.tiers()

    def collect_garbage(self, grace: float) -> list[Idle]:
        """Remove blobs that no record has named for so many seconds; see `store.garbage`."""
        return collect(self._store, self._used, grace)

    def restore_lost(self) -> None:
        """See `store.restoring`."""
        restore_lost(self._store)

    def _held(self, name: str) -> tuple[ExpertRecord, bytes]:
        """The record of that name as the store has it now, as a value and as bytes."""
        data = self._store.get_record(name) if NAME_PATTERN.fullmatch(name) else None
        record = parse_record(name, data)
        if record is None or data is None:
            if name in self._store.lost():
                raise StoreUnavailableError(
                    f"the store has lost the expert {name}, which may come back; try again soon"
                )
            raise NotFoundError(f"there is no expert named {name[:64]!r}", param="name")
        return record, data

    def _put(self, record: ExpertRecord, expected: bytes | Expect) -> None:
        if not self._store.put_record(record.name, record_to_json(record), expected=expected):
            raise StoreError("the store let another writer in")

    def _checked_name(self, name: str) -> str:
        if not NAME_PATTERN.fullmatch(name):
            raise InvalidRequestError(
                "a name has 1 to 64 characters: lower-case letters, digits, '.', '_' and '-', the first one a letter "
                "or a digit",
                param="name",
            )
        if name in self._reserved:
            raise InvalidRequestError(f"the name {name} is reserved; choose another", param="name")
        return name

    def _release(self, digests: set[str]) -> None:
        """Blobs that a record does not name any more. Where this fails, the next collection notes it."""
        with suppress(StoreError):
            release(self._store, self._used, digests)

    def _used(self) -> set[str] | None:
        records = self._all()
        return used_by(records.values()) if len(records) == len(self._records) else None


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise StoreError(f"cannot store the exemplars: {error.strerror}") from None
