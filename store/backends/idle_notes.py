"""Since when blobs of the embedded store have been without a record: one small file, replaced atomically."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from pathlib import Path


class IdleNotes:
    """Notes that several processes share; whoever changes them holds the store.

    Notes that are lost or cannot be read count as none: blobs are then kept for another grace period.

    Args:
        path: the file, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def seconds(self) -> Mapping[str, float]:
        """Digest → seconds since it was noted."""
        now = time.time()
        return {digest: max(0.0, now - since) for digest, since in self._read().items()}

    def add(self, digests: Collection[str]) -> None:
        """Note them as of now."""
        if digests:
            self._write(self._read() | dict.fromkeys(digests, time.time()))

    def drop(self, digests: Collection[str]) -> None:
        """Take notes back."""
        notes = self._read()
        if notes.keys() & digests:
            self._write({digest: since for digest, since in notes.items() if digest not in digests})

    def _read(self) -> dict[str, float]:
        try:
            notes = json.loads(self._path.read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        items = notes.items() if isinstance(notes, dict) else ()
        return {digest: since for digest, since in items if isinstance(since, int | float)}

    def _write(self, notes: Mapping[str, float]) -> None:
        temporary = self._path.with_suffix(".new")
        temporary.write_text(json.dumps(notes))
        temporary.replace(self._path)
