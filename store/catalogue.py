"""Names → experts: the one way to find an expert."""

from __future__ import annotations

import bisect
import difflib
import heapq
import logging
import operator
import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from store.access import OPERATOR, Caller
from store.alias import Alias, parse_entry
from store.backends import BlobStore
from store.errors import (
    ExpertFileError,
    ExpertUnavailableError,
    InvalidRequestError,
    NotFoundError,
    SwitchyardError,
    UntrustedError,
)
from store.exemplars import parse_exemplars
from store.expert_file import read_header
from store.lineage import Lineage
from store.manifest import BaseManifest
from store.record import ExpertRecord
from store.tiers import TierStats
from store.trust import NO_TRUST, Trust

_log = logging.getLogger(__name__)

_NEAR, _COMPARED = 50, 12
"""Names on either side of a misspelt one that are looked at, and how many of them are compared letter by letter: that
takes a tenth of a millisecond each, and anybody may ask for names that are not there."""


class Catalogue:
    """The experts of one base in a store, for whoever looks one up. Thread-safe; sees what other processes change.

    All records are held in memory and read again when the store's edition has changed, so that looking up an expert
    costs microseconds, whatever their number.

    Experts that the store holds for other bases keep their names but are not listed or served. A damaged record is
    logged and counts as absent: it must not hide the others, and can be published over.

    Args:
        store: where the bytes are.
        base: what experts are made for.
        trust: whose signatures experts must have; others keep their names, and are neither listed nor served.

    Raises:
        StoreError: the store cannot be read.
    """

    def __init__(self, store: BlobStore, base: BaseManifest, trust: Trust = NO_TRUST) -> None:
        self._store = store
        self._base = base
        self.trust = trust
        self._reading = threading.Lock()
        self._edition: int | None = None
        self._records: Mapping[str, bytes] = {}
        self._catalogue: Mapping[str, ExpertRecord] = {}
        self._aliases: Mapping[str, Alias] = {}
        self._also: Mapping[str, tuple[str, ...]] = {}
        self._untrusted: frozenset[str] = frozenset()
        self._lineage = Lineage((), trust.accepts, base.fingerprint)
        self._served = _Served((), self._lineage, ())

    def get(self, name: str, by: Caller = OPERATOR) -> ExpertRecord:
        """The expert of that name, or of that alias.

        Raises:
            NotFoundError: there is none for this caller; the message lists close matches.
            ExpertUnavailableError: it was made for another base, or what it stands on is not here.
            UntrustedError: it is not signed as it must be.
        """
        catalogue = self._all()
        alias = self._aliases.get(name)
        record = catalogue.get(name if alias is None else alias.target)
        if record is None or not by.sees(record.access) or not self._lineage.sees(by, record):
            close = self._served.like(name[:64], by)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise NotFoundError(f"there is no model or expert named {name[:64]!r}{hint}", param="model")
        if record.base_fingerprint != self._base.fingerprint:
            raise ExpertUnavailableError(f"the expert {name} was made for another base than the one served")
        if record.name in self._untrusted:
            raise UntrustedError(f"the expert {name} is not signed by a key that this server trusts: it is not served")
        self._lineage.chain(record.relative_to)
        return record

    def stack(self, name: str, by: Caller = OPERATOR) -> Sequence[str]:
        """Digests of an expert that another one may stand on, and of all that it stands on itself, nearest first.

        Args:
            name: what it is called, or the digest of one of its versions.

        Raises:
            InvalidRequestError: there is none for this caller, or it stands on too many; `param` is "relative_to".
        """
        if not any(version.digest == name for record in self.list(by) for version in record.versions):
            try:
                name = self.get(name, by).digest
            except SwitchyardError as error:
                raise InvalidRequestError(error.message, param="relative_to", code="parent_not_found") from None
        return self.lineage.stack(name)

    @property
    def lineage(self) -> Lineage:
        """Which experts stand on which, now."""
        self._all()
        return self._lineage

    def list(self, by: Caller = OPERATOR) -> list[ExpertRecord]:
        """The experts of this base that exist for the caller, by name."""
        return list(self._seen(by)[0])

    def names(self, by: Caller) -> frozenset[str]:
        """Their names. Takes microseconds, and gives the same object until experts change."""
        return self._seen(by)[1]

    def page(
        self,
        *,
        after: str = "",
        limit: int,
        matching: str = "",
        tags: Collection[str] = (),
        by: Caller = OPERATOR,
    ) -> tuple[Sequence[ExpertRecord], bool]:
        """Some experts of this base that exist for the caller, by name, and whether there are more behind them.

        Args:
            after: only names behind this one, which need not exist.
            limit: how many at most.
            matching: only those with these letters, of either case, in what is said about them: name, description,
                author, licence, tags, metadata.
            tags: only those with all of these.
        """
        served, wanted = self._seen(by)[0], matching.casefold()
        start = bisect.bisect_right(served, after, key=lambda record: record.name)
        found: list[ExpertRecord] = []
        for record in served[start:]:
            if (wanted or tags) and not record.matches(wanted, tags):
                continue
            if len(found) == limit:
                return found, True
            found.append(record)
        return found, False

    def alias(self, name: str, by: Caller = OPERATOR) -> Alias:
        """The alias of that name.

        Raises:
            NotFoundError: there is none, or none of an expert that exists for the caller.
        """
        catalogue = self._all()
        found = self._aliases.get(name)
        target = None if found is None else catalogue.get(found.target)
        if found is None or not (by.is_admin or (target is not None and by.sees(target.access))):
            raise NotFoundError(f"there is no alias named {name[:64]!r}", param="alias", code="alias_not_found")
        return found

    def aliases(self, by: Caller = OPERATOR) -> Sequence[tuple[Alias, ExpertRecord]]:
        """All aliases of experts of this base that exist for the caller, by name, each with its expert."""
        served = {record.name: record for record in self._seen(by)[0]}
        return [(one, served[one.target]) for one in self._aliases.values() if one.target in served]

    def aliases_of(self, name: str) -> Sequence[str]:
        """Aliases of an expert, as of the last look: asks no store."""
        return self._also.get(name, ())

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

    @property
    def edition(self) -> int:
        """Another number once experts have come or gone. Takes microseconds."""
        return self._store.edition()

    def _seen(self, by: Caller) -> tuple[tuple[ExpertRecord, ...], frozenset[str]]:
        self._all()
        return self._served.to(by)

    def _all(self) -> Mapping[str, ExpertRecord]:
        """Every sound record by name, of whatever base."""
        edition = self._store.edition()
        if edition == self._edition:
            return self._catalogue
        with self._reading:
            records, known = self._store.records(), self._records
            catalogue: dict[str, ExpertRecord] = {}
            aliases: dict[str, Alias] = {}
            also: dict[str, list[str]] = {}
            for name, data in records.items():
                same = known.get(name) == data
                entry = self._catalogue.get(name) or self._aliases.get(name) if same else parse_entry(name, data)
                if isinstance(entry, Alias):
                    aliases[name] = entry
                    also.setdefault(entry.target, []).append(name)
                elif entry is not None:
                    catalogue[name] = entry
            served = [r for r in catalogue.values() if r.base_fingerprint == self._base.fingerprint]
            untrusted = frozenset(r.name for r in served if not self.trust.accepts(r))
            for name in untrusted - self._untrusted:
                _log.warning("the expert %s is not signed by a trusted key: it is not served", name)
            served = [r for r in served if r.name not in untrusted]
            lineage = Lineage(catalogue.values(), self.trust.accepts, self._base.fingerprint)
            for record in (r for r in served if not lineage.is_whole(r)):
                _log.warning("the expert %s stands on another one that is not here: it is not served", record.name)
            served = [r for r in served if lineage.is_whole(r)]
            self._records, self._catalogue = records, catalogue
            self._served, self._lineage = _Served(tuple(served), lineage, tuple(aliases.values())), lineage
            self._aliases, self._untrusted = aliases, untrusted
            self._also = {target: tuple(names) for target, names in also.items()}
            self._edition = edition  # last: whoever sees it sees the rest; what changed since is read next time
        return catalogue


class _Served:
    """The experts of one edition, and what of them exists for whom: worked out once for every tenant."""

    def __init__(self, records: tuple[ExpertRecord, ...], lineage: Lineage, aliases: tuple[Alias, ...]) -> None:
        self._records = records
        self._lineage = lineage
        self._aliases = aliases
        self._seen: dict[tuple[bool, str | None], tuple[tuple[ExpertRecord, ...], frozenset[str]]] = {}
        self._spelt: dict[tuple[bool, str | None], tuple[list[str], list[str]]] = {}

    def to(self, by: Caller) -> tuple[tuple[ExpertRecord, ...], frozenset[str]]:
        """The records and their names."""
        kind = by.is_admin, by.tenant
        found = self._seen.get(kind)
        if found is None:
            records = tuple(r for r in self._records if by.sees(r.access) and self._lineage.sees(by, r))
            found = self._seen[kind] = records, frozenset(record.name for record in records)
        return found

    def like(self, name: str, by: Caller) -> Sequence[str]:
        """Names and aliases that are spelt much like one that is not there, the closest first."""
        kind = by.is_admin, by.tenant
        if kind not in self._spelt:
            known = self.to(by)[1]
            words = sorted({*known, *(alias.name for alias in self._aliases if alias.target in known)})
            self._spelt[kind] = words, sorted(word[::-1] for word in words)
        # A slip of the pen leaves what is before it, and what is after it: those are neighbours, read one way or back.
        forwards, backwards = self._spelt[kind]
        near = {*_around(name, forwards), *(word[::-1] for word in _around(name[::-1], backwards))}
        likely = heapq.nlargest(_COMPARED, sorted(near), key=lambda word: _in_common(word, name))
        return difflib.get_close_matches(name, likely, n=3)


def _around(word: str, words: Sequence[str]) -> Sequence[str]:
    place = bisect.bisect_left(words, word)
    return words[max(0, place - _NEAR) : place + _NEAR]


def _in_common(one: str, other: str) -> int:
    """Letters at the beginning and at the end."""
    found = 0
    for ours, theirs in ((one, other), (one[::-1], other[::-1])):
        same = [*map(operator.eq, ours, theirs), False]
        found += same.index(False)
    return found
