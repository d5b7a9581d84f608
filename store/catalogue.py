"""Names → experts: the one way to find an expert."""

from __future__ import annotations

import bisect
import difflib
import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from store.alias import Alias, parse_entry
from store.backends import BlobStore
from store.errors import ExpertFileError, ExpertUnavailableError, NotFoundError
from store.exemplars import parse_exemplars
from store.expert_file import read_header
from store.manifest import BaseManifest
from store.record import ExpertRecord
from store.tiers import TierStats


class Catalogue:
    """The experts of one base in a store, for whoever looks one up. Thread-safe; sees what other processes change.

    All records are held in memory and read again when the store's edition has changed, so that looking up an expert
    costs microseconds, whatever their number.

    Experts that the store holds for other bases keep their names but are not listed or served. A damaged record is
    logged and counts as absent: it must not hide the others, and can be published over.

    Args:
        store: where the bytes are.
        base: what experts are made for.

    Raises:
        StoreError: the store cannot be read.
    """

    def __init__(self, store: BlobStore, base: BaseManifest) -> None:
        self._store = store
        self._base = base
        self._reading = threading.Lock()
        self._edition: int | None = None
        self._records: Mapping[str, bytes] = {}
        self._catalogue: Mapping[str, ExpertRecord] = {}
        self._aliases: Mapping[str, Alias] = {}
        self._also: Mapping[str, tuple[str, ...]] = {}
        self._served: tuple[ExpertRecord, ...] = ()

    def get(self, name: str) -> ExpertRecord:
        """The expert of that name, or of that alias.

        Raises:
            NotFoundError: there is none; the message lists close matches.
            ExpertUnavailableError: it was made for another base.
        """
        catalogue = self._all()
        alias = self._aliases.get(name)
        record = catalogue.get(name if alias is None else alias.target)
        if record is None:
            close = difflib.get_close_matches(name[:64], [*(known.name for known in self._served), *self._aliases], n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise NotFoundError(f"there is no model or expert named {name[:64]!r}{hint}", param="model")
        if record.base_fingerprint != self._base.fingerprint:
            raise ExpertUnavailableError(f"the expert {name} was made for another base than the one served")
        return record

    def list(self) -> list[ExpertRecord]:
        """All experts of this base, by name."""
        self._all()
        return list(self._served)

    def page(
        self, *, after: str = "", limit: int, matching: str = "", tags: Collection[str] = ()
    ) -> tuple[Sequence[ExpertRecord], bool]:
        """Some experts of this base, by name, and whether there are more behind them.

        Args:
            after: only names behind this one, which need not exist.
            limit: how many at most.
            matching: only those with these letters, of either case, in what is said about them: name, description,
                author, licence, tags, metadata.
            tags: only those with all of these.
        """
        self._all()
        served, wanted = self._served, matching.casefold()
        start = bisect.bisect_right(served, after, key=lambda record: record.name)
        found: list[ExpertRecord] = []
        for record in served[start:]:
            if (wanted or tags) and not record.matches(wanted, tags):
                continue
            if len(found) == limit:
                return found, True
            found.append(record)
        return found, False

    def alias(self, name: str) -> Alias:
        """The alias of that name.

        Raises:
            NotFoundError: there is none.
        """
        self._all()
        found = self._aliases.get(name)
        if found is None:
            raise NotFoundError(f"there is no alias named {name[:64]!r}", param="alias", code="alias_not_found")
        return found

    def aliases(self) -> Sequence[tuple[Alias, ExpertRecord]]:
        """All aliases of experts of this base, by name, each with its expert."""
        self._all()
        served = {record.name: record for record in self._served}
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

    def _all(self) -> Mapping[str, ExpertRecord]:
        """Every sound record by name, of whatever base."""
        edition = self._store.edition()
        if edition == self._edition:
            return self._catalogue
        with self._reading:
            records, known = self._store.records(), self._records
            catalogue: dict[str, ExpertRecord] = {}
            aliases: dict[str, Alias] = {}
            also: dict[str, tuple[str, ...]] = {}
            for name, data in records.items():
                same = known.get(name) == data
                entry = self._catalogue.get(name) or self._aliases.get(name) if same else parse_entry(name, data)
                if isinstance(entry, Alias):
                    aliases[name] = entry
                    also[entry.target] = (*also.get(entry.target, ()), name)
                elif entry is not None:
                    catalogue[name] = entry
            served = [r for r in catalogue.values() if r.base_fingerprint == self._base.fingerprint]
            self._records, self._catalogue, self._served = records, catalogue, tuple(served)
            self._aliases, self._also = aliases, also
            self._edition = edition  # last: whoever sees it sees the rest; what changed since is read next time
        return catalogue
