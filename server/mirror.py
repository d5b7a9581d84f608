"""Expert files that lie elsewhere, served as they come and go: a watched folder, a bucket, a repository."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Protocol

from server.library import Library
from server.mirror_state import MirrorState, Taken
from store.access import OPERATOR
from store.errors import (
    ConflictError,
    ExpertUnavailableError,
    InvalidRequestError,
    NotFoundError,
    NotPermittedError,
    SwitchyardError,
    TooLargeError,
    UntrustedError,
)
from store.expert_file import read_header
from store.intake import Received

log = logging.getLogger(__name__)

_FOR_GOOD = (InvalidRequestError, ConflictError, NotPermittedError, TooLargeError, UntrustedError)
"""What another attempt with the same file would meet again."""


_LONGEST_PAUSE = 60.0


@dataclass(frozen=True)
class Brought:
    """A file that was fetched, in quarantine, and what lay beside it."""

    file: Received
    exemplars: Sequence[str] | None
    signature: str | None


class Source(Protocol):
    """Where expert files lie."""

    @property
    def name(self) -> str:
        """What the log calls it; no two sources of a server have the same."""
        ...

    async def look(self) -> Mapping[str, str | None]:
        """What is there: a file's name → a stamp, which is another one once it has changed, or what lies beside it.

        None stands for a file that is still being written.

        Raises:
            SwitchyardError: it cannot be read just now; nothing is concluded from that.
        """
        ...

    async def fetch(self, key: str, stamp: str) -> Brought:
        """Bring a file into quarantine; the caller discards it.

        Raises:
            InvalidRequestError, TooLargeError: it is no use, and will not be until it changes.
            SwitchyardError: it cannot be had just now.
        """
        ...


class Mirror:
    """Keeps a source's files published. The source is right: what is in it is served, what has left it is not.

    A file that is refused is reported once and left alone until it changes. A name that another expert has is never
    taken from it, also where a tenant has published one under a name that was the mirror's, and what somebody has put
    in an expert's place since is never removed.
    """

    def __init__(self, source: Source, library: Library, state: MirrorState) -> None:
        self._source = source
        self._library = library
        self._state = state
        self._failed: dict[str, tuple[int, float]] = {}
        """File → failures in a row that may pass, and when to try again."""

    async def sync(self) -> None:
        """One look, and what follows from it.

        Raises:
            SwitchyardError: something failed that may go well next time; what could be done was done.
        """
        there = await self._source.look()
        taken = await asyncio.to_thread(self._state.load)
        gone = taken.keys() - there.keys()
        published = {record.name for record in await self._library.list(OPERATOR)}
        failure: SwitchyardError | None = None
        for key, stamp in sorted(there.items()):
            if stamp is None or not _is_news(taken.get(key), stamp, published):
                continue
            failures, not_before = self._failed.get(key, (0, 0.0))
            if time.monotonic() < not_before:
                continue
            try:
                await self._take(key, stamp, gone)
            except _FOR_GOOD as error:
                log.warning("%s of %s is not served: %s", key, self._source.name, error.message)
                before = taken.get(key)
                name, digest = (before.name, before.digest) if before is not None else (None, None)
                await self._note(key, Taken(stamp, name, digest, error.message))
            except SwitchyardError as error:
                failure = failure or error
                # Every attempt copies the file: a store that is full need not hear of it every second.
                pause = min(_LONGEST_PAUSE, 2.0 * failures)
                self._failed[key] = failures + 1, time.monotonic() + pause
            else:
                self._failed.pop(key, None)
        # Last: a file that was renamed has taken its expert over by now.
        for key in sorted(gone):
            await self._let_go(key)
        if failure is not None:
            raise failure

    async def _take(self, key: str, stamp: str, gone: Set[str]) -> None:
        brought = await self._source.fetch(key, stamp)
        try:
            header = await asyncio.to_thread(read_header, brought.file.path)
            name = header.name or PurePosixPath(key).name.removesuffix(".safetensors")
            before = self._state.taken.get(key)
            published = {
                one.digest
                for other, one in self._state.taken.items()
                if one.name == name and (other == key or other in gone)
            }
            is_ours = bool(published) and await self._may_replace(name, published)
            exemplars = brought.exemplars
            if exemplars is None and is_ours:  # those that lay beside it may have gone
                exemplars = header.exemplars
            record, is_new = await self._library.publish(
                brought.file,
                name=name,
                exemplars=exemplars,
                by=OPERATOR,
                replace=is_ours,
                signature=brought.signature,
            )
        finally:
            await asyncio.to_thread(brought.file.discard)
        if is_new:
            log.info("%s of %s is served as %s", key, self._source.name, record.name)
        await self._note(key, Taken(stamp, record.name, record.digest, None))
        if before is not None and before.name not in (None, record.name):
            await self._unpublish(before)

    async def _may_replace(self, name: str, published: Set[str | None]) -> bool:
        """Whether a name that was the mirror's is still: it may have gone, and a tenant have taken it."""
        try:
            record = await self._library.get(name, OPERATOR)
        except (NotFoundError, ExpertUnavailableError, UntrustedError):  # nothing that is served
            return True
        return record.access.owner is None or record.digest in published

    async def _let_go(self, key: str) -> None:
        gone = self._state.taken[key]
        # First the note: killed in between, an expert too many is there, not one that comes and goes.
        await self._note(key, None)
        await self._unpublish(gone)

    async def _unpublish(self, gone: Taken) -> None:
        if gone.name is None or any(one.name == gone.name for one in self._state.taken.values()):
            return
        try:
            record = await self._library.get(gone.name, OPERATOR)
            if (record.name, record.digest) != (gone.name, gone.digest):
                log.warning("%s stays: it is another file now than the one that left %s", gone.name, self._source.name)
                return
            await self._library.remove(gone.name, OPERATOR)
        except NotFoundError:
            return
        except ConflictError as error:
            log.warning("%s has left %s and stays: %s", gone.name, self._source.name, error.message)
            return
        log.info("%s has left %s and is not served any more", gone.name, self._source.name)

    async def _note(self, key: str, taken: Taken | None) -> None:
        await asyncio.to_thread(self._state.note, key, taken)


def _is_news(before: Taken | None, stamp: str, published: set[str]) -> bool:
    if before is None or before.stamp != stamp:
        return True
    return before.fault is None and before.name not in published
