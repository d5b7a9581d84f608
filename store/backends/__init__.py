"""Where bytes live: one small protocol, so that the registry does not know whether it is a disk or Redis."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from enum import Enum
from pathlib import Path
from typing import Final, Protocol

from store.tiers import TierStats


class Expect(Enum):
    """What `BlobStore.put_record` may find under a name, besides exact bytes."""

    ANYTHING = "anything"
    ABSENT = "absent"


class Health(Enum):
    """What `BlobStore.verify` found."""

    SOUND = "sound"
    HEALED = "healed"
    DAMAGED = "damaged"
    GONE = "gone"


ANYTHING: Final = Expect.ANYTHING
ABSENT: Final = Expect.ABSENT


class BlobStore(Protocol):
    """Immutable blobs by sha256, and small mutable records by name.

    Safe to use from many threads and processes at once. What a call has acknowledged survives the process, killed at
    any instant; what it has not is invisible. Every method raises StoreError where the medium fails,
    StorageFullError where it has no room, and StoreUnavailableError where it does not answer.
    """

    def quarantine(self) -> Path:
        """A folder for bytes that are not trusted yet, on the filesystem that `put_blob` takes them over from.

        It belongs to this process and is emptied after its death.
        """
        ...

    def put_blob(self, path: Path, digest: str) -> None:
        """Take over a file of the quarantine as the blob `digest` (hex sha256 of its bytes, the caller's word for it).

        Replaces a blob of that digest, and so heals a damaged one. On an error the file may be in either place.
        """
        ...

    def fetch(self, digest: str) -> Path:
        """A local file with exactly the bytes of that digest, verified. Open it at once: it may be a cache's.

        Raises:
            ExpertUnavailableError: there is no such blob, or its bytes are damaged.
        """
        ...

    def read(self, digest: str) -> bytes:
        """Exactly the bytes of that digest: what was hashed is what is returned.

        A damaged copy is reported, and made anew from another one where there is one.

        Raises:
            ExpertUnavailableError: there is no such blob, or its bytes are damaged.
        """
        ...

    def delete_blob(self, digest: str) -> None:
        """Forget a blob; no error if there is none."""
        ...

    def blobs(self) -> set[str]:
        """Digests of all blobs."""
        ...

    def blob_bytes(self, digest: str) -> int | None:
        """Size of a blob; None if there is none, or it was never finished."""
        ...

    def idle(self) -> Mapping[str, float]:
        """Blobs noted as idle, whoever noted them: digest → seconds since then."""
        ...

    def note_idle(self, digests: Collection[str]) -> None:
        """Note that blobs are idle from now on. Inside `exclusive`."""
        ...

    def forget_idle(self, digests: Collection[str]) -> None:
        """Take notes back. Inside `exclusive`."""
        ...

    def verify(self, digest: str, *, repair: bool) -> Health:
        """Read all copies of a blob afresh. With `repair`, a damaged one is made anew from a sound one."""
        ...

    def put_record(self, name: str, data: bytes, *, expected: bytes | Expect) -> bool:
        """Set a record if what is there is `expected` (compare and set). False, and nothing changed, if it is not."""
        ...

    def get_record(self, name: str) -> bytes | None:
        """The record of that name, or None."""
        ...

    def delete_record(self, name: str) -> bool:
        """Remove a record; False if there was none."""
        ...

    def records(self) -> dict[str, bytes]:
        """All records by name, in order. Cheap where little has changed since the last call.

        Inside `exclusive` they are the latest; elsewhere another process's change may show a moment later.
        """
        ...

    def edition(self) -> int:
        """A number that is another one once records have changed, whoever changed them. Takes microseconds."""
        ...

    def lost(self) -> Mapping[str, bytes]:
        """Records that this process saw acknowledged and that the medium has lost since, by name.

        `records` goes on to hold them until they are put again or deleted.
        """
        ...

    def tiers(self) -> tuple[TierStats, ...]:
        """What has been going on in the places where it keeps blobs."""
        ...

    def exclusive(self) -> AbstractContextManager[None]:
        """One writer at a time, over all threads and processes: for steps that span a blob and its record.

        Reentrant in a thread. A holder that dies lets go. Readers need not enter.
        """
        ...

    def close(self) -> None:
        """Let go of everything; the store is not used afterwards."""
        ...
