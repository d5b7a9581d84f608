"""The ledger of an embedded store: a folder beside the experts, readable by its owner only.

    ledger/KIND/NAME.json   documents, replaced atomically
    ledger/sums/KIND.json   sums
    ledger/lock             held while anything is changed
    ledger/edition          counts the changes of documents: odd while one is under way

Token buckets belong to the process: servers that share a folder each grant the whole rate. Those that share a Redis
share its buckets.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from store.backends.edition_file import EditionFile
from store.backends.filesystem import reported, sync_folder
from store.backends.ledger import Balance, LocalBuckets, Rate
from store.errors import StoreError
from store.expert_info import NAME_PATTERN

_SUMS = "sums"


class DiskLedger:
    """`Ledger` in a folder, which is created if need be.

    Raises:
        StoreError: the folder cannot be created or written; StorageFullError, there and wherever something is written,
            where the disk has no room.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._thread_lock = threading.RLock()
        self._buckets = LocalBuckets()
        with reported("open the ledger"):
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock_file = (root / "lock").open("ab")
            self._edition = EditionFile(root / "edition")
        with self._exclusive(), reported("open the ledger"):
            self._edition.settle()

    def close(self) -> None:
        """See `Ledger.close`."""
        self._lock_file.close()
        self._edition.close()

    def edition(self) -> int:
        """See `Ledger.edition`."""
        return self._edition.value()

    def documents(self, kind: str) -> Mapping[str, bytes]:
        """See `Ledger.documents`."""
        found = {}
        with reported("read the ledger"):
            for path in sorted((self._root / kind).glob("*.json")):
                if NAME_PATTERN.fullmatch(path.stem):
                    try:
                        found[path.stem] = path.read_bytes()
                    except FileNotFoundError:  # deleted since it was listed
                        continue
        return found

    def put(self, kind: str, name: str, data: bytes, *, absent: bool = False) -> bool:
        """See `Ledger.put`."""
        target = self._path(kind, name)
        with self._exclusive(), reported("write to the ledger"):
            if absent and target.exists():
                return False
            target.parent.mkdir(exist_ok=True, mode=0o700)
            with self._edition.changing():
                _replace(target, data)
        return True

    def delete(self, kind: str, name: str) -> bool:
        """See `Ledger.delete`."""
        target = self._path(kind, name)
        with self._exclusive(), reported("write to the ledger"):
            if not target.exists():
                return False
            with self._edition.changing():
                target.unlink()
                sync_folder(target.parent)
        return True

    def add(self, kind: str, amounts: Mapping[str, int]) -> None:
        """See `Ledger.add`."""
        target = self._path(_SUMS, kind)
        with self._exclusive(), reported("write to the ledger"):
            sums = dict(self.sums(kind))
            for name, amount in amounts.items():
                sums[name] = sums.get(name, 0) + amount
            target.parent.mkdir(exist_ok=True, mode=0o700)
            _replace(target, json.dumps(sums, sort_keys=True).encode())

    def sums(self, kind: str) -> Mapping[str, int]:
        """See `Ledger.sums`."""
        with reported("read the ledger"):
            try:
                sums: dict[str, int] = json.loads(self._path(_SUMS, kind).read_bytes())
            except FileNotFoundError:
                return {}
            except ValueError:
                raise StoreError(f"the sums of {kind} are damaged") from None
        return sums

    def take(self, bucket: str, rate: Rate, cost: float, *, least: float) -> Balance:
        """See `Ledger.take`. Of this process."""
        with self._thread_lock:
            return self._buckets.take(bucket, rate, cost, least=least)

    def _path(self, kind: str, name: str) -> Path:
        if not NAME_PATTERN.fullmatch(name):
            raise StoreError("not a name of a document")
        return self._root / kind / f"{name}.json"

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        with self._thread_lock, reported("lock the ledger"):
            fcntl.flock(self._lock_file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._lock_file, fcntl.LOCK_UN)


def _replace(target: Path, data: bytes) -> None:
    """Write a file atomically and durably; the lock is held."""
    temporary = target.with_suffix(".tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError:  # on a disk that is full, what was written takes what room there is
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)
