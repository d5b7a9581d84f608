"""Which sources a server mirrors, by its settings."""

from __future__ import annotations

import hashlib

from server.chores import Chore
from server.library import Library
from server.mirror import Mirror, Source
from server.mirror_state import MirrorState
from server.settings import Settings
from server.watching import WatchedFolder

_WATCH_SECONDS = 1.0


def mirroring(settings: Settings, library: Library) -> list[Chore]:
    """A chore for every source.

    Raises:
        InvalidRequestError: a source cannot be; `param` names the setting.
    """
    chores = []
    if settings.watch is not None:
        folder = WatchedFolder(settings.watch, library.quarantine, library.max_upload_bytes)
        chores.append(_chore(folder, settings, library, _WATCH_SECONDS))
    return chores


def _chore(source: Source, settings: Settings, library: Library, seconds: float) -> Chore:
    called = hashlib.sha256(source.name.encode()).hexdigest()[:16]
    state = MirrorState(settings.data_dir / "sources" / f"{called}.json")
    return Chore(f"mirroring {source.name}", seconds, Mirror(source, library, state).sync)
