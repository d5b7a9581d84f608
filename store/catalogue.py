"""Names → experts: the one way to find an expert."""

from __future__ import annotations

import bisect
import difflib
import threading
from collections.abc import Collection, Mapping, Sequence

from store.backends import BlobStore
from store.errors import ExpertUnavailableError, NotFoundError
from store.manifest import BaseManifest
from store.record import ExpertRecord, parse_record


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
        self._served: tuple[ExpertRecord, ...] = ()

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
