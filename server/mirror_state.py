"""What a mirror has made of its source's files, kept over restarts: what left it meanwhile is known then."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from store.errors import StoreError
from store.strict_json import FieldError, Fields, parse_json

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Taken:
    """What became of one file.

    Attributes:
        stamp: of the file, when it was looked at.
        name, digest: what it was published as; None if it never was.
        fault: why it was refused, or None.
    """

    stamp: str
    name: str | None
    digest: str | None
    fault: str | None


class MirrorState:
    """A small file, replaced atomically. One that cannot be read counts as empty: every file is looked at again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._taken: dict[str, Taken] | None = None

    @property
    def taken(self) -> Mapping[str, Taken]:
        """File → what became of it, as of the last `load` and `note`."""
        return self._taken or {}

    def load(self) -> Mapping[str, Taken]:
        """A copy of `taken`, read from disk the first time.

        Raises:
            StoreError: the file system failed.
        """
        if self._taken is None:
            self._taken = self._read()
        return dict(self._taken)

    def note(self, key: str, taken: Taken | None) -> None:
        """What became of a file; None forgets it.

        Raises:
            StoreError: it cannot be written.
        """
        notes = dict(self.load())
        if taken is None:
            notes.pop(key, None)
        else:
            notes[key] = taken
        temporary = self._path.with_suffix(".new")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("w", encoding="utf-8") as file:
                json.dump({key: asdict(one) for key, one in notes.items()}, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._path)
        except OSError as error:
            raise StoreError(f"cannot keep {self._path.name}: {error.strerror}") from error
        self._taken = notes

    def _read(self) -> dict[str, Taken]:
        try:
            fields = Fields(parse_json(self._path.read_bytes(), "state"), "state")
            return {key: _taken(fields.child(key)) for key in fields.names()}
        except FileNotFoundError:
            return {}
        except FieldError as error:
            log.warning("%s is damaged and counts as empty: %s %s", self._path, error.field, error.message)
            return {}
        except OSError as error:
            raise StoreError(f"cannot read {self._path.name}: {error.strerror}") from error


def _taken(fields: Fields) -> Taken:
    def text(key: str) -> str | None:
        return fields.text(key, max_bytes=10_000) if fields.has(key) else None

    return Taken(fields.text("stamp", max_bytes=10_000), text("name"), text("digest"), text("fault"))
