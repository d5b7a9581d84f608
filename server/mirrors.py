"""Which sources a server mirrors, by its settings."""

from __future__ import annotations

import hashlib

from server.chores import Chore
from server.library import Library
from server.mirror import Mirror, Source
from server.mirror_state import MirrorState
from server.remote_source import RemoteSource
from server.settings import Settings
from server.watching import WatchedFolder
from store.remote import check_allowed, parse_location

_WATCH_SECONDS = 1.0


def mirroring(settings: Settings, library: Library) -> list[Chore]:
    """A chore for every source.

    Raises:
        InvalidRequestError: a source cannot be, or is not allowed.
        MissingPackageError: what reads it is not installed.
    """
    chores = []
    if settings.watch is not None:
        folder = WatchedFolder(settings.watch, library.quarantine, library.max_upload_bytes)
        chores.append(_chore(folder, settings, library, _WATCH_SECONDS))
    for url in sorted(settings.sources):
        location = parse_location(url)
        check_allowed(location, settings.hub_allow)
        seconds = settings.download_seconds
        source = RemoteSource(location, library.quarantine, library.max_upload_bytes, seconds)
        chores.append(_chore(source, settings, library, settings.sources_seconds))
    return chores


def _chore(source: Source, settings: Settings, library: Library, seconds: float) -> Chore:
    called = hashlib.sha256(source.name.encode()).hexdigest()[:16]
    state = MirrorState(settings.data_dir / "sources" / f"{called}.json")
    return Chore(f"mirroring {source.name}", seconds, Mirror(source, library, state).sync)
