"""The embedded store: a folder.

    blobs/ab/abcd…      immutable, named by sha256
    records/NAME.json   small, replaced atomically
    quarantine/ID/      bytes on their way in; one folder per process, held by a lock on its file `.lock`
    lock                held while anything is changed
    idle.json           since when blobs have been without a record
    edition             counts the changes of records: odd while one is under way

Everything enters by rename, after an fsync of the file and before one of the folder (a rename is durable only once the
folder is). The locks are flock: the kernel drops them when their holder dies, whatever way.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from store.backends import ABSENT, ANYTHING, Expect, Health
from store.backends.edition_file import EditionFile
from store.backends.filesystem import reading, reported, sync_folder
from store.backends.idle_notes import IdleNotes
from store.backends.quarantine import Quarantine
from store.errors import ExpertDamagedError, StoreError
from store.expert_info import DIGEST_PATTERN, NAME_PATTERN
from store.tiers import Tier, TierMeter, TierStats

_TRUST_SECONDS = 5.0
"""How long a hash counts: the steps of one load share it, and bytes that rot later are noticed by the next load."""

_Stamp = tuple[int, int, int]
"""What changes with a file: inode, size, time of the last change in nanoseconds."""


class DiskStore:
    """`BlobStore` in a folder, which is created if need be.

    Args:
        root: the folder; all of it must be on one filesystem, which must support rename and flock.
        meter: who counts; default: one of its own.

    Raises:
        StoreError: the folder cannot be created or written.
    """

    def __init__(self, root: Path, meter: TierMeter | None = None) -> None:
        self._root = root
        self._meter = meter or TierMeter(Tier.STORE)
        self._thread_lock = threading.RLock()
        self._depth = 0
        self._notes = IdleNotes(root / "idle.json")
        self._verified: dict[str, tuple[_Stamp, float]] = {}
        self._records: dict[str, tuple[_Stamp, bytes]] = {}
        with reported("open the store"):
            for folder in ("blobs", "records", "quarantine"):
                (root / folder).mkdir(parents=True, exist_ok=True)
            self._lock_file = (root / "lock").open("ab")
            self._edition = EditionFile(root / "edition")
        with self.exclusive(), reported("open the store"):
            self._edition.settle()
            self._quarantine = Quarantine(root / "quarantine")

    def close(self) -> None:
        """See `BlobStore.close`. Empties this process's quarantine."""
        self._quarantine.close()
        self._lock_file.close()
        self._edition.close()

    def quarantine(self) -> Path:
        """See `BlobStore.quarantine`."""
        return self._quarantine.path

    def put_blob(self, path: Path, digest: str) -> None:
        """See `BlobStore.put_blob`."""
        target = self._blob(digest)
        with self.exclusive(), reported("store the file"):
            with path.open("rb") as file:
                os.fsync(file.fileno())
            path.chmod(0o444)
            target.parent.mkdir(exist_ok=True)
            sync_folder(target.parent.parent)
            path.replace(target)
            sync_folder(target.parent)
            self._verified.pop(digest, None)

    def fetch(self, digest: str) -> Path:
        """See `BlobStore.fetch`. Hashes a blob unless it did so just now and its file is still the same."""
        path = self._blob(digest)
        with reading(digest), path.open("rb") as file:
            stamp = _stamp(os.fstat(file.fileno()))
            seen, when = self._verified.get(digest, (None, 0.0))
            if seen != stamp or time.monotonic() - when > _TRUST_SECONDS:
                self._verified.pop(digest, None)
                self._check(digest, hashlib.file_digest(file, "sha256").hexdigest())
                self._verified[digest] = stamp, time.monotonic()
        return path

    def read(self, digest: str) -> bytes:
        """See `BlobStore.read`."""
        began = time.perf_counter()
        data = self.verified(digest)
        self._meter.loaded(time.perf_counter() - began)
        return data

    def verified(self, digest: str) -> bytes:
        """As `read`, and not counted as a load: for whoever counts it himself."""
        with reading(digest):
            data = self._blob(digest).read_bytes()
        self._check(digest, hashlib.sha256(data).hexdigest())
        return data

    def tiers(self) -> tuple[TierStats, ...]:
        """See `BlobStore.tiers`."""
        return (self._meter.stats(),)

    def delete_blob(self, digest: str) -> None:
        """See `BlobStore.delete_blob`."""
        target = self._blob(digest)
        with self.exclusive(), reported("delete the file"):
            self._verified.pop(digest, None)
            target.unlink(missing_ok=True)
            if target.parent.exists():
                sync_folder(target.parent)

    def blobs(self) -> set[str]:
        """See `BlobStore.blobs`."""
        with reported("list the store"):
            names = {path.name for path in (self._root / "blobs").glob("*/*")}
        return {name for name in names if DIGEST_PATTERN.fullmatch(name)}

    def blob_bytes(self, digest: str) -> int | None:
        """See `BlobStore.blob_bytes`."""
        with reported("look at the file"):
            try:
                return self._blob(digest).stat().st_size
            except FileNotFoundError:
                return None

    def idle(self) -> Mapping[str, float]:
        """See `BlobStore.idle`."""
        with reported("read the notes"):
            return self._notes.seconds()

    def note_idle(self, digests: Collection[str]) -> None:
        """See `BlobStore.note_idle`."""
        with self.exclusive(), reported("keep the notes"):
            self._notes.add(digests)

    def forget_idle(self, digests: Collection[str]) -> None:
        """See `BlobStore.forget_idle`."""
        with self.exclusive(), reported("keep the notes"):
            self._notes.drop(digests)

    def verify(self, digest: str, *, repair: bool) -> Health:
        """See `BlobStore.verify`. There is one copy: nothing to repair it from."""
        del repair
        try:
            with self._blob(digest).open("rb") as file:
                sound = hashlib.file_digest(file, "sha256").hexdigest() == digest
        except FileNotFoundError:
            return Health.GONE
        except OSError:  # a sector that cannot be read
            sound = False
        if not sound:
            self._meter.damaged(digest)
        return Health.SOUND if sound else Health.DAMAGED

    def put_record(self, name: str, data: bytes, *, expected: bytes | Expect) -> bool:
        """See `BlobStore.put_record`."""
        target = self._record(name)
        with self.exclusive():
            current = self.get_record(name)
            if expected is ABSENT and current is not None:
                return False
            if expected is not ABSENT and expected is not ANYTHING and current != expected:
                return False
            with reported("store the record"):
                temporary = self._quarantine.path / f".record-{name}"
                try:
                    with temporary.open("wb") as file:
                        file.write(data)
                        file.flush()
                        os.fsync(file.fileno())
                    # The kernel's own time stamps come in ticks of milliseconds: two changes could look like one.
                    os.utime(temporary, ns=(now := time.time_ns(), now))
                    with self._edition.changing():
                        temporary.replace(target)
                finally:
                    with suppress(OSError):
                        temporary.unlink(missing_ok=True)
                sync_folder(target.parent)
        return True

    def get_record(self, name: str) -> bytes | None:
        """See `BlobStore.get_record`."""
        with reported("read the record"):
            try:
                return self._record(name).read_bytes()
            except FileNotFoundError:
                return None

    def delete_record(self, name: str) -> bool:
        """See `BlobStore.delete_record`."""
        target = self._record(name)
        with self.exclusive(), reported("delete the record"):
            if not target.exists():
                return False
            with self._edition.changing():
                target.unlink()
            sync_folder(target.parent)
        return True

    def records(self) -> dict[str, bytes]:
        """See `BlobStore.records`. Reads the files that have changed since the last call."""
        found: dict[str, tuple[_Stamp, bytes]] = {}
        known = self._records
        with reported("list the store"), os.scandir(self._root / "records") as entries:
            for entry in entries:
                name, _, suffix = entry.name.rpartition(".")
                if suffix != "json" or not NAME_PATTERN.fullmatch(name):
                    continue
                try:
                    stamp = _stamp(entry.stat())
                except FileNotFoundError:  # deleted since it was listed
                    continue
                if name in known and known[name][0] == stamp:
                    found[name] = known[name]
                elif (data := self.get_record(name)) is not None:
                    found[name] = stamp, data
        self._records = found
        return {name: found[name][1] for name in sorted(found)}

    def edition(self) -> int:
        """See `BlobStore.edition`."""
        return self._edition.value()

    def lost(self) -> Mapping[str, bytes]:
        """See `BlobStore.lost`. A file system that loses what was flushed is beyond us."""
        return {}

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """See `BlobStore.exclusive`."""
        with self._thread_lock:
            if self._depth == 0:
                with reported("lock the store"):
                    fcntl.flock(self._lock_file, fcntl.LOCK_EX)
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if self._depth == 0:
                    fcntl.flock(self._lock_file, fcntl.LOCK_UN)

    def _check(self, digest: str, found: str) -> None:
        if found != digest:
            self._meter.damaged(digest)
            raise ExpertDamagedError(f"the stored bytes of {digest[:12]}… are damaged; upload the expert again")

    def _blob(self, digest: str) -> Path:
        if not DIGEST_PATTERN.fullmatch(digest):
            raise StoreError("not a sha256 digest")
        return self._root / "blobs" / digest[:2] / digest

    def _record(self, name: str) -> Path:
        if not NAME_PATTERN.fullmatch(name):
            raise StoreError("not a valid record name")
        return self._root / "records" / f"{name}.json"


def _stamp(stat: os.stat_result) -> _Stamp:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
