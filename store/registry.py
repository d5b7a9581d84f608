"""How experts come, change and go: every change of a store's catalogue."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from store.access import OPERATOR, AccessChange, Caller
from store.alias import Alias, parse_entry
from store.aliases import Aliases
from store.backends import ABSENT, BlobStore, Expect
from store.catalogue import Catalogue
from store.errors import ConflictError, NotFoundError, StoreError, StoreUnavailableError, UntrustedError
from store.exemplar_changes import Choice, exemplified, put_exemplars
from store.exemplars import exemplar_bytes
from store.expert_file import digest_of, validate
from store.expert_header import ExpertHeader
from store.expert_info import NAME_PATTERN
from store.garbage import Idle, collect, release, used_by
from store.manifest import BaseManifest
from store.names import Names
from store.ownership import NO_QUOTA, Quota, access_for, changed_access, check_name_free, check_owned, check_quota
from store.record import ExpertRecord, check_record, check_same, record_of, record_to_json
from store.restoring import restore_lost
from store.trust import NO_TRUST, Trust


class Registry(Catalogue):
    """The experts of one base in a store, and all that changes them. Thread-safe, over all processes.

    Args:
        store: where the bytes are.
        base: what experts are checked against.
        reserved: names no expert may take: the base's own, "auto".
        trust: whose signatures experts must have.

    Raises:
        StoreError: the store cannot be read.
    """

    def __init__(self, store: BlobStore, base: BaseManifest, reserved: frozenset[str], trust: Trust = NO_TRUST) -> None:
        super().__init__(store, base, trust)
        self._names = Names(reserved)
        self.alias_changes = Aliases(store, self, self._names)

    def publish(
        self,
        path: Path,
        *,
        name: str | None = None,
        exemplars: Sequence[str] | None = None,
        replace: bool = False,
        signature: str | None = None,
        header: ExpertHeader | None = None,
        digest: str | None = None,
        by: Caller = OPERATOR,
        quota: Quota = NO_QUOTA,
    ) -> tuple[ExpertRecord, bool]:
        """Validate a quarantined file and publish it; live at once, durable on return.

        Args:
            path: the file, in the store's quarantine. Gone on return; on an error the caller deletes it if it is there.
            name: what to call it; None takes the name in its header, or "expert-" and 12 digits of its digest.
            exemplars: prompts that win over those in its header; None leaves them as they are.
            replace: let the name point to this file, whatever it points to; that becomes its latest earlier version.
            signature: of the file; one that comes later, from who may change the expert, is added to what is there.
            header, digest: of a file that was validated and hashed since it came; None for doing so now.
            by: who publishes it; a new name is its tenant's.
            quota: what that tenant may keep.

        Returns:
            The record, and whether anything is new. Publishing what is already there is no error.

        Raises:
            ExpertFileError, WrongBaseError: the file is not a sound expert of this base.
            InvalidRequestError: the name is malformed or reserved, or what the expert stands on is not here.
            SignatureError, UntrustedError: it is not signed as it must be.
            ConflictError: the name belongs to another expert, or to this one with other exemplars.
            NotPermittedError, QuotaExceededError: the expert is not the caller's, or its tenant keeps enough.
            StoreError: the store failed; nothing half published is left, but an unacknowledged record may be.
        """
        header = validate(path, self._base) if header is None else header
        exemplars = None if exemplars is None else list(dict.fromkeys(exemplars))
        digest = digest_of(path) if digest is None else digest
        self.trust.check(digest, signature)
        chosen = self._names.check(name or header.name or f"expert-{digest[:12]}")
        own = None if exemplars is None or tuple(exemplars) == header.exemplars else exemplar_bytes(exemplars)
        record = record_of(
            header,
            name=chosen,
            digest=digest,
            bytes=path.stat().st_size,
            exemplar_count=len(header.exemplars if exemplars is None else exemplars),
            exemplars_digest=hashlib.sha256(own).hexdigest() if own is not None else None,
            signature=signature,
            access=access_for(by),
        )
        with self._store.exclusive():
            present = self._store.get_record(chosen)
            existing = self._expert(chosen, present, by)
            check_name_free(chosen, existing, by, is_taken=present is not None, replace=replace)
            self.lineage.check_new(record, by)
            before = existing.blobs if existing is not None else set()
            fresh = {blob for blob in record.blobs if self._store.blob_bytes(blob) is None}
            if existing is not None and replace and existing.differs(record, exemplars_given=exemplars is not None):
                record = existing.pointing_to(record, self.lineage.kept(existing.versions, record))
                existing = None
            elif existing is not None:
                check_same(existing, record, exemplars_given=exemplars is not None)
                if signature not in (None, existing.signature):  # another one says that it is somebody else's work
                    check_owned(existing, by)
            if existing is None:
                check_quota(self._all().values(), record, by, quota)
            try:
                # Blobs first: at no instant does a record lack its bytes.
                if own is not None:
                    put_exemplars(self._store, own)
                self._store.put_blob(path, digest)
            except StoreError:
                for blob in fresh:  # a store that is full needs the room
                    with suppress(StoreError):
                        self._store.delete_blob(blob)
                raise
            if existing is not None:  # its blobs are written all the same: that heals damaged ones
                if present is None or signature in (None, existing.signature):
                    return existing, False
                signed = existing.signed(signature)
                self._put(signed, present)
                return signed, False
            # Where this fails the record may have arrived, or arrive yet: its blobs are left to the next collection.
            self._put(record, ABSENT if present is None else present)
            if record.earlier:  # one of them may be one too many now
                self._release(before - record.blobs)
        return record, True

    def remove(self, name: str, by: Caller = OPERATOR, *, force: bool = False) -> ExpertRecord:
        """Unpublish an expert; its bytes go later, if no other name refers to them. Returns what it was.

        Args:
            force: its aliases go too; else an expert that has any stays.

        Raises:
            NotFoundError: there is none.
            ConflictError: it has aliases, others stand on it, or the name is an alias.
            NotPermittedError: it is not the caller's.
        """
        with self._store.exclusive():
            record = self._all().get(name) if name in self._store.lost() else self._held(name, by)[0]
            if record is None:
                raise NotFoundError(f"there is no expert named {name[:64]!r}", param="name")
            check_owned(record, by)
            self.lineage.check_unneeded(record, by)
            if (aliases := self.aliases_of(name)) and not force:
                raise ConflictError(
                    f"the expert {name} is also called {', '.join(aliases)}: remove these aliases first, or all of it "
                    "(?force=true, or rm --force)",
                    param="name",
                    code="has_aliases",
                )
            self._drop_aliases(name)
            # The record first: a blob without a record is garbage, a record without its blob is a broken promise.
            self._store.delete_record(name)
            self._release(record.blobs)
        return record

    def roll_back(self, name: str, digest: str | None = None, by: Caller = OPERATOR) -> ExpertRecord:
        """Let a name point to one of its earlier versions again; the present one becomes the latest earlier one.

        Args:
            digest: of the version; None takes the latest earlier one.

        Raises:
            NotFoundError: there is no such expert, or it has no such version.
            NotPermittedError: it is not the caller's.
            UntrustedError: the version is not signed as it must be.
        """
        with self._store.exclusive():
            record, present = self._held(name, by)
            wanted = next((one for one in record.earlier if digest in (None, one.digest)), None)
            if wanted is None:
                which = "earlier version" if digest is None else f"earlier version {digest[:12]}"
                raise NotFoundError(f"the expert {name} has no {which}", param="digest", code="version_not_found")
            if not self.trust.accepts(wanted):
                raise UntrustedError(f"that version of {name} is not signed by a key that this server trusts")
            self.expert_path(wanted.digest)  # raises where its bytes are gone or damaged
            rest = tuple(one for one in record.versions if one != wanted)
            changed = record.pointing_to(wanted, rest)
            self._put(changed, present)
        return changed

    def describe(
        self,
        name: str,
        *,
        description: str | None = None,
        tags: Sequence[str] | None = None,
        metadata: Mapping[str, str | None] | None = None,
        by: Caller = OPERATOR,
    ) -> ExpertRecord:
        """Change what is said about an expert, see `ExpertRecord.described`; its file stays. Raises as `_change`."""
        return self._change(name, by, lambda record: record.described(description, tags, metadata))

    def set_access(self, name: str, change: AccessChange, by: Caller = OPERATOR) -> ExpertRecord:
        """Let an expert be seen by others, or be somebody else's. Raises as `_change`."""
        return self._change(name, by, lambda record: replace(record, access=changed_access(record.access, change, by)))

    def set_exemplars(self, name: str, choose: Choice, by: Caller = OPERATOR) -> ExpertRecord:
        """Let prompts find an expert by other exemplars, see `exemplified`; its file stays. Raises as both."""
        return self._change(name, by, lambda one: exemplified(self._store, one, choose, self.exemplars))

    def _change(self, name: str, by: Caller, change: Callable[[ExpertRecord], ExpertRecord]) -> ExpertRecord:
        """Change what is kept beside an expert's file.

        Raises:
            NotFoundError: there is none.
            NotPermittedError: it is not the caller's.
            InvalidRequestError: something breaks a rule of the format; `param` says what.
        """
        with self._store.exclusive():
            record, present = self._held(name, by)
            changed = change(record)
            check_record(changed)
            if changed != record:
                self._put(changed, present)
                if idle := record.blobs - changed.blobs:
                    self._release(idle)
        return changed

    def undo(self, record: ExpertRecord) -> None:
        """Take back a publication that nobody has been told of: its name points to what it pointed to before.

        Nothing happens if somebody else has changed the name since.
        """
        with self._store.exclusive():
            present = self._store.get_record(record.name)
            if present is None or parse_entry(record.name, present) != record:
                return
            if record.earlier:
                self._put(record.pointing_to(record.earlier[0], record.earlier[1:]), present)
            else:
                self._drop_aliases(record.name)
                self._store.delete_record(record.name)
            self._release(record.blobs)

    def collect_garbage(self, grace: float) -> list[Idle]:
        """Remove blobs that no record has named for so many seconds; see `store.garbage`."""
        return collect(self._store, self._used, grace)

    def restore_lost(self) -> None:
        """See `store.restoring`."""
        restore_lost(self._store)

    def _expert(self, name: str, data: bytes | None, by: Caller) -> ExpertRecord | None:
        """The expert that the store keeps under its own name; None if there is none, or none for the caller to know."""
        entry = parse_entry(name, data)
        if not isinstance(entry, Alias):
            return entry
        target = self._all().get(entry.target)
        if by.is_admin or (target is not None and by.sees(target.access)):
            raise ConflictError(
                f"{name} is an alias of {entry.target}: use that name, or remove the alias",
                param="name",
                code="is_alias",
            )
        return None

    def _held(self, name: str, by: Caller) -> tuple[ExpertRecord, bytes]:
        """The caller's record of that name as the store has it now, as a value and as bytes."""
        data = self._store.get_record(name) if NAME_PATTERN.fullmatch(name) else None
        record = self._expert(name, data, by)
        if record is None or data is None:
            if name in self._store.lost():
                raise StoreUnavailableError(
                    f"the store has lost the expert {name}, which may come back; try again soon"
                )
            raise NotFoundError(f"there is no expert named {name[:64]!r}", param="name")
        check_owned(record, by)
        return record, data

    def _put(self, record: ExpertRecord, expected: bytes | Expect) -> None:
        if not self._store.put_record(record.name, record_to_json(record), expected=expected):
            raise StoreError("the store let another writer in")

    def _drop_aliases(self, name: str) -> None:
        """Before their expert goes: at no instant does an alias point to nothing. The store is held."""
        self._all()
        for alias in self.aliases_of(name):
            self._store.delete_record(alias)

    def _release(self, digests: set[str]) -> None:
        """Blobs that a record does not name any more. Where this fails, the next collection notes it."""
        with suppress(StoreError):
            release(self._store, self._used, digests)

    def _used(self) -> set[str] | None:
        records = self._all()
        return used_by(records.values()) if len(records) + len(self._aliases) == len(self._records) else None
