"""A bucket or a repository whose expert files are served."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from pathlib import Path

from server.mirror import Brought
from store.errors import StoreUnavailableError
from store.exemplars import MAX_BYTES, parse_exemplars
from store.remote import EXPERTS, Location, RemoteFolder
from store.signature import MAX_BYTES as MAX_SIGNATURE_BYTES
from store.signature import SUFFIX, decode_signature

_EXEMPLARS = ".jsonl"


class RemoteSource:
    """`Source` in a `RemoteFolder`: every `NAME.safetensors`, with `NAME.jsonl` and `NAME.safetensors.sig` beside it.

    Args:
        location: which was checked to be allowed.
        quarantine: where copies are put.
        max_bytes: of an expert file.
        seconds: that a download may take.

    Raises:
        MissingPackageError: what reads such addresses is not installed.
    """

    def __init__(self, location: Location, quarantine: Path, max_bytes: int, seconds: float) -> None:
        self._location = location
        self._folder = RemoteFolder(location)
        self._quarantine = quarantine
        self._max_bytes = max_bytes
        self._seconds = seconds

    @property
    def name(self) -> str:
        """See `Source.name`."""
        return str(self._location)

    async def look(self) -> Mapping[str, str | None]:
        """See `Source.look`. Stores show a file only once it is whole."""
        return await asyncio.to_thread(self._look)

    async def fetch(self, key: str, stamp: str) -> Brought:
        """See `Source.fetch`. A server that stops does not wait for the rest."""
        given_up = threading.Event()
        try:
            return await asyncio.to_thread(self._fetch, key, stamp, given_up)
        except asyncio.CancelledError:
            given_up.set()
            raise

    def _look(self) -> dict[str, str | None]:
        there = self._folder.list()
        return {name: _stamp(name, there) for name in there if name.endswith(EXPERTS)}

    def _fetch(self, key: str, stamp: str, given_up: threading.Event) -> Brought:
        def check(_done: int, _size: int) -> None:
            if given_up.is_set():
                raise StoreUnavailableError("nobody waits for the download any more")

        there = self._folder.list()
        exemplars, signature = f"{key.removesuffix(EXPERTS)}{_EXEMPLARS}", f"{key}{SUFFIX}"
        prompts = signed = None
        if exemplars in there:
            prompts = parse_exemplars(self._folder.read(exemplars, max_bytes=MAX_BYTES))
        if signature in there:
            signed = decode_signature(self._folder.read(signature, max_bytes=MAX_SIGNATURE_BYTES))
        file = self._folder.download(
            key, self._quarantine, max_bytes=self._max_bytes, seconds=self._seconds, tell=check
        )
        # A download is many requests, and the file may have been replaced between two of them.
        if _stamp(key, self._folder.list()) != stamp:
            file.discard()
            raise StoreUnavailableError(f"{key} changed while it was read")
        return Brought(file, prompts, signed)


def _stamp(name: str, there: Mapping[str, str]) -> str:
    beside = (name, f"{name.removesuffix(EXPERTS)}{_EXEMPLARS}", f"{name}{SUFFIX}")
    return " | ".join(there.get(one, "-") for one in beside)
