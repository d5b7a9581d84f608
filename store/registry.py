"""Names → experts: the one way to find an expert."""

from __future__ import annotations

import bisect
import dataclasses
import difflib
import hashlib
import json
import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from store.backends import ABSENT, BlobStore
from store.errors import (
    ConflictError,
    ExpertFileError,
    ExpertUnavailableError,
    InvalidRequestError,
    NotFoundError,
    StoreError,
)
from store.exemplars import parse_exemplars
from store.expert_file import digest_of, read_header, validate
from store.expert_header import DIGEST_PATTERN, MAX_DESCRIPTION_BYTES, NAME_PATTERN, ExpertHeader
from store.manifest import BaseManifest
from store.strict_json import FieldError, Fields, parse_json

__all__ = ["ExpertRecord", "Registry", "parse_exemplars", "parse_record"]

_log = logging.getLogger(__name__)

KEPT_VERSIONS = 8
"""Earlier versions that a name can go back to; what runs on one of them can finish."""


@dataclass(frozen=True)
class ExpertRecord:
    """A published expert.

    Attributes:
        name: what requests call it.
        digest: hex sha256 of its file; what caches and mixes call it.
        bytes: size of its file.
        created: when it was published, seconds since 1970.
        base_fingerprint: the base it was made for.
        codec, density, bits_per_param, description: from its header.
        exemplar_count: how many exemplars routing may learn from.
        exemplars_digest: blob of the exemplars uploaded beside the file, or None where those of its header count.
        earlier: what the name pointed to before, the latest first; at most `KEPT_VERSIONS`, whose bytes are kept.
    """

    name: str
    digest: str
    bytes: int
    created: int
    base_fingerprint: str
    codec: str
    density: float
    bits_per_param: float
    description: str
    exemplar_count: int
    exemplars_digest: str | None
    earlier: tuple[ExpertRecord, ...] = ()

    @property
    def blobs(self) -> set[str]:
        """Digests of all blobs that belong to this record, those of its earlier versions included."""
        own = {self.digest} | ({self.exemplars_digest} if self.exemplars_digest else set())
        return own.union(*(version.blobs for version in self.earlier))

    @property
    def versions(self) -> tuple[ExpertRecord, ...]:
        """This version and the earlier ones, each by itself."""
        return (dataclasses.replace(self, earlier=()), *self.earlier)


class Registry:
    """The experts of one base in a store. Thread-safe; sees what other processes publish and remove.

    All records are held in memory and read again when the store's edition has changed, so that looking up an expert
    costs microseconds, whatever their number.

    Experts that the store holds for other bases keep their names but are not listed or served. A damaged record is
    logged and counts as absent: it must not hide the others, and can be published over.

    Args:
        store: where the bytes are.
        base: what experts are checked against.
        reserved: names no expert may take: the base's own, "auto".

    Raises:
        StoreError: the store cannot be read.
    """

    def __init__(self, store: BlobStore, base: BaseManifest, reserved: frozenset[str]) -> None:
        self._store = store
        self._base = base
        self._reserved = reserved
        self._reading = threading.Lock()
        self._edition: int | None = None
        self._records: Mapping[str, bytes] = {}
        self._catalogue: Mapping[str, ExpertRecord] = {}
        self._served: tuple[ExpertRecord, ...] = ()
        self._collect_garbage()

    def publish(
        self, path: Path, *, name: str | None = None, exemplars: Sequence[str] | None = None, replace: bool = False
    ) -> tuple[ExpertRecord, bool]:
        """Validate a quarantined file and publish it; live at once, durable on return.

        Args:
            path: the file, in the store's quarantine. Gone on return; on an error the caller deletes it if it is there.
            name: what to call it; None takes the name in its header, or "expert-" and 12 digits of its digest.
            exemplars: prompts that win over those in its header; None leaves them as they are.
            replace: let the name point to this file, whatever it points to; that becomes its latest earlier version.

        Returns:
            The record, and whether anything is new. Publishing what is already there is no error.

        Raises:
            ExpertFileError, WrongBaseError: the file is not a sound expert of this base.
            InvalidRequestError: the name is malformed or reserved (`param` is "name").
            ConflictError: the name belongs to another expert, or to this one with other exemplars.
            StoreError: the store failed; nothing half published is left, but an unacknowledged record may be.
        """
        header = validate(path, self._base)
        exemplars = None if exemplars is None else list(dict.fromkeys(exemplars))
        digest = digest_of(path)
        chosen = self._checked_name(name or header.name or f"expert-{digest[:12]}")
        own = None if exemplars is None or tuple(exemplars) == header.exemplars else _exemplar_bytes(exemplars)
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
        )
        with self._store.exclusive():
            present = self._store.get_record(chosen)
            existing = parse_record(chosen, present)
            before = existing.blobs if existing is not None else set()
            if existing is not None and replace and _differ(existing, record, exemplars_given=exemplars is not None):
                record = dataclasses.replace(record, earlier=existing.versions[:KEPT_VERSIONS])
                existing = None
            elif existing is not None:
                _check_same(existing, record, header, exemplars_given=exemplars is not None)
            try:
                # Blobs first: at no instant does a record lack its bytes.
                if own is not None and record.exemplars_digest is not None:
                    beside = path.with_name(f"{path.name}.exemplars")
                    _write(beside, own)
                    self._store.put_blob(beside, record.exemplars_digest)
                self._store.put_blob(path, digest)
            except StoreError:
                with suppress(StoreError):
                    self._drop(record.blobs)
                raise
            if existing is not None:  # its blobs are written all the same: that heals damaged ones
                return existing, False
            expected = ABSENT if present is None else present
            # Where this fails the record may have arrived, or arrive yet: its blobs are left to the next collection.
            if not self._store.put_record(chosen, _to_json(record), expected=expected):
                raise StoreError("the store let another writer in")
            if record.earlier:  # one of them may be one too many now
                self._drop(before - record.blobs)
        return record, True

    def get(self, name: str) -> ExpertRecord:
        """The expert of that name.

        Raises:
            NotFoundError: there is none; the message lists close matches.
            ExpertUnavailableError: it was made for another base.
        """
        record = self._all().get(name)
        if record is None:
            close = difflib.get_close_matches(name[:64], [known.name for known in self._served], n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise NotFoundError(f"there is no model or expert named {name[:64]!r}{hint}", param="model")
        if record.base_fingerprint != self._base.fingerprint:
            raise ExpertUnavailableError(f"the expert {name} was made for another base than the one served")
        return record

    def list(self) -> list[ExpertRecord]:
        """All experts of this base, by name."""
        self._all()
        return list(self._served)

    def page(self, *, after: str = "", limit: int, matching: str = "") -> tuple[Sequence[ExpertRecord], bool]:
        """Some experts of this base, by name, and whether there are more behind them.

        Args:
            after: only names behind this one, which need not exist.
            limit: how many at most.
            matching: only those with these letters, of either case, in name or description.
        """
        self._all()
        served, wanted = self._served, matching.casefold()
        start = bisect.bisect_right(served, after, key=lambda record: record.name)
        found: list[ExpertRecord] = []
        for record in served[start:]:
            if wanted and wanted not in record.name and wanted not in record.description.casefold():
                continue
            if len(found) == limit:
                return found, True
            found.append(record)
        return found, False

    @property
    def edition(self) -> int:
        """Another number once experts have come or gone. Takes microseconds."""
        return self._store.edition()

    def remove(self, name: str) -> ExpertRecord:
        """Unpublish an expert; its bytes go when no other name refers to them. Returns what it was.

        Raises:
            NotFoundError: there is none.
        """
        with self._store.exclusive():
            record = self._all().get(name)
            if record is None:
                raise NotFoundError(f"there is no expert named {name[:64]!r}", param="name")
            # The record first: a blob without a record is garbage, a record without its blob is a broken promise.
            self._store.delete_record(name)
            self._drop(record.blobs)
        return record

    def roll_back(self, name: str, digest: str | None = None) -> ExpertRecord:
        """Let a name point to one of its earlier versions again; the present one becomes the latest earlier one.

        Args:
            digest: of the version; None takes the latest earlier one.

        Raises:
            NotFoundError: there is no such expert, or it has no such version.
        """
        with self._store.exclusive():
            record = self._all().get(name)
            if record is None:
                raise NotFoundError(f"there is no expert named {name[:64]!r}", param="name")
            wanted = next((one for one in record.earlier if digest in (None, one.digest)), None)
            if wanted is None:
                which = "earlier version" if digest is None else f"earlier version {digest[:12]}"
                raise NotFoundError(f"the expert {name} has no {which}", param="digest", code="version_not_found")
            self.expert_path(wanted.digest)  # raises where its bytes are gone or damaged
            rest = tuple(one for one in record.versions if one != wanted)
            self._put(dataclasses.replace(wanted, earlier=rest), record)
        return dataclasses.replace(wanted, earlier=rest)

    def undo(self, record: ExpertRecord) -> None:
        """Take back a publication that nobody has been told of: its name points to what it pointed to before.

        Nothing happens if somebody else has changed the name since.
        """
        with self._store.exclusive():
            if self._all().get(record.name) != record:
                return
            if record.earlier:
                former = record.earlier[0]
                self._put(dataclasses.replace(former, earlier=record.earlier[1:]), record)
            else:
                self._store.delete_record(record.name)
            self._drop(record.blobs)

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

    def restore_lost(self) -> None:
        """Put back what the store's medium has lost, where its bytes are still on this machine; give up the rest.

        Raises:
            StoreError: the store failed; what is left is tried again by the next call.
        """
        for name, data in self._store.lost().items():
            record = parse_record(name, data)
            with self._store.exclusive():
                try:
                    for digest in record.blobs if record is not None else ():
                        self._put_again(digest)
                except ExpertUnavailableError:
                    _log.error("the expert %s is lost: its bytes are nowhere; upload it again", name)
                    self._store.delete_record(name)
                    continue
                if self._store.put_record(name, data, expected=ABSENT):
                    _log.warning("the expert %s was lost by the store and has been put back", name)

    def _put(self, record: ExpertRecord, expected: ExpertRecord) -> None:
        if not self._store.put_record(record.name, _to_json(record), expected=_to_json(expected)):
            raise StoreError("the store let another writer in")

    def _put_again(self, digest: str) -> None:
        with tempfile.NamedTemporaryFile(dir=self._store.quarantine(), delete=False) as copy:
            path = Path(copy.name)
        try:
            shutil.copyfile(self._store.fetch(digest), path)
            self._store.put_blob(path, digest)
        except OSError as error:
            raise StoreError(f"cannot copy the file: {error.strerror}") from error
        finally:
            path.unlink(missing_ok=True)

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

    def _all(self) -> Mapping[str, ExpertRecord]:
        """Every sound record by name, of whatever base."""
        edition = self._store.edition()
        if edition == self._edition:
            return self._catalogue
        with self._reading:
            records, known = self._store.records(), self._records
            catalogue = {}
            for name, data in records.items():
                same = known.get(name) == data
                record = self._catalogue.get(name) if same else parse_record(name, data)
                if record is not None:
                    catalogue[name] = record
            served = [r for r in catalogue.values() if r.base_fingerprint == self._base.fingerprint]
            self._records, self._catalogue, self._served = records, catalogue, tuple(served)
            self._edition = edition  # last: whoever sees it sees the rest; what changed since is read next time
        return catalogue

    def _collect_garbage(self) -> None:
        """Delete blobs that a process killed between a blob and its record left behind."""
        with self._store.exclusive():
            if len(self._all()) == len(self._records):  # a damaged record may refer to any of them
                self._drop(self._store.blobs())

    def _drop(self, digests: set[str]) -> None:
        """Delete those of the blobs that no record refers to. Called with the store held."""
        used: set[str] = set().union(*(record.blobs for record in self._all().values()))
        for digest in digests - used:
            self._store.delete_blob(digest)


def parse_record(name: str, data: bytes | None) -> ExpertRecord | None:
    """A record as a value; None, and a line in the log, if it is damaged, None too if there is none."""
    try:
        return None if data is None else _from_json(name, data)
    except FieldError as error:
        _log.warning("the record of %s is damaged and ignored: %s %s", name, error.field, error.message)
        return None


def _check_same(existing: ExpertRecord, record: ExpertRecord, header: ExpertHeader, *, exemplars_given: bool) -> None:
    if existing.digest != record.digest:
        other = "" if existing.base_fingerprint == header.base_fingerprint else " of another base"
        raise ConflictError(
            f"the name {record.name} belongs to another expert{other} ({existing.digest[:12]}…); replace it "
            "(PUT, or push --replace), or choose another name",
            param="name",
        )
    if exemplars_given and existing.exemplars_digest != record.exemplars_digest:
        raise ConflictError(
            f"the expert {record.name} is published with other exemplars; replace it (PUT, or push --replace)",
            param="exemplars",
        )


def _differ(existing: ExpertRecord, record: ExpertRecord, *, exemplars_given: bool) -> bool:
    other = exemplars_given and existing.exemplars_digest != record.exemplars_digest
    return existing.digest != record.digest or other


def _exemplar_bytes(exemplars: Sequence[str]) -> bytes:
    """Exemplars as JSON lines, checked as an upload is."""
    data = "".join(json.dumps(text, ensure_ascii=False) + "\n" for text in exemplars).encode("utf-8")
    parse_exemplars(data)
    return data


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise StoreError(f"cannot store the exemplars: {error.strerror}") from None


def _to_json(record: ExpertRecord) -> bytes:
    fields = asdict(record)
    for version in fields["earlier"]:
        del version["earlier"]
    return json.dumps(fields, indent=1, sort_keys=True).encode("ascii") + b"\n"


def _from_json(name: str, data: bytes) -> ExpertRecord:
    fields = Fields(parse_json(data, "record"), "record")
    earlier = fields.items("earlier", max_items=KEPT_VERSIONS) if fields.has("earlier") else []
    versions = (_version(name, Fields(item, "earlier", prefix="earlier.")) for item in earlier)
    return dataclasses.replace(_version(name, fields), earlier=tuple(versions))


def _version(name: str, fields: Fields) -> ExpertRecord:
    digest = DIGEST_PATTERN
    if fields.text("name", max_bytes=64) != name:
        fields.fail("name", "is not the record's own")
    return ExpertRecord(
        name=name,
        digest=fields.text("digest", max_bytes=64, pattern=digest),
        bytes=fields.integer("bytes", low=0, high=2**53),
        created=fields.integer("created", low=0, high=2**53),
        base_fingerprint=fields.text("base_fingerprint", max_bytes=64, pattern=digest),
        codec=fields.text("codec", max_bytes=32),
        density=fields.number("density", low=0.0, high=1.0),
        bits_per_param=fields.number("bits_per_param", low=0.0, high=1024.0),
        description=fields.text("description", max_bytes=MAX_DESCRIPTION_BYTES),
        exemplar_count=fields.integer("exemplar_count", low=0, high=2**31),
        exemplars_digest=fields.text("exemplars_digest", max_bytes=64, pattern=digest)
        if fields.has("exemplars_digest")
        else None,
    )
