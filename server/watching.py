"""A folder whose expert files are served as they appear."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from pathlib import Path

from server.mirror import Brought
from store.errors import InvalidRequestError, StoreError, StoreUnavailableError, TooLargeError
from store.exemplars import MAX_BYTES, parse_exemplars
from store.intake import Intake
from store.signature import SUFFIX, read_beside

_FILES, _EXEMPLARS = ".safetensors", ".jsonl"
_SETTLED_SECONDS = 2.0
"""A file that nobody has touched for so long is whole."""
_PIECE = 1 << 20


class WatchedFolder:
    """`Source` in a folder: every `NAME.safetensors`, with `NAME.jsonl` and `NAME.safetensors.sig` beside it.

    A file counts once two looks have found it the same, or nobody has touched it for a while. Files that begin with a
    dot are somebody's work in progress.

    Args:
        folder: which must exist; subfolders are not looked into.
        quarantine: where copies are put.
        max_bytes: of an expert file.

    Raises:
        InvalidRequestError: there is no such folder.
    """

    def __init__(self, folder: Path, quarantine: Path, max_bytes: int) -> None:
        if not folder.is_dir():
            raise InvalidRequestError(f"there is no folder {folder} to watch", param="watch")
        self._folder = folder
        self._device = folder.stat().st_dev
        self._quarantine = quarantine
        self._max_bytes = max_bytes
        self._seen: Mapping[str, str] = {}

    @property
    def name(self) -> str:
        """See `Source.name`."""
        return str(self._folder)

    async def look(self) -> Mapping[str, str | None]:
        """See `Source.look`."""
        return await asyncio.to_thread(self._look)

    async def fetch(self, key: str, stamp: str) -> Brought:
        """See `Source.fetch`."""
        return await asyncio.to_thread(self._fetch, key, stamp)

    def _look(self) -> dict[str, str | None]:
        before, now = self._seen, time.time()
        try:
            # Another device under the name: it was unmounted, and its experts have not been deleted.
            if self._folder.stat().st_dev != self._device:
                raise StoreUnavailableError(f"{self._folder} is not the folder that was there at the start")
            names = [entry.name for entry in os.scandir(self._folder) if _is_expert(entry)]
        except OSError as error:
            raise StoreUnavailableError(f"cannot read {self._folder}: {error.strerror}") from None
        stamps = {name: self._stamp(name) for name in names}
        self._seen = {name: stamp for name, (stamp, _) in stamps.items()}
        return {
            name: stamp if before.get(name) == stamp or now - changed > _SETTLED_SECONDS else None
            for name, (stamp, changed) in stamps.items()
        }

    def _stamp(self, name: str) -> tuple[str, float]:
        """A file and what lies beside it, as far as the file system tells, and when it was touched last."""
        parts, changed = [], 0.0
        for path in (self._folder / name, self._exemplars_of(name), self._folder / f"{name}{SUFFIX}"):
            try:
                stat = path.stat()
            except OSError:
                parts.append("-")
            else:
                parts.append(f"{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}")
                changed = max(changed, stat.st_ctime)
        return " ".join(parts), changed

    def _fetch(self, key: str, stamp: str) -> Brought:
        path = self._folder / key
        exemplars, signature = self._read_exemplars(key), read_beside(path)
        try:
            with Intake(self._quarantine, max_bytes=self._max_bytes) as intake:
                with path.open("rb") as file:
                    while piece := file.read(_PIECE):
                        intake.write(piece)
                if self._stamp(key)[0] != stamp:
                    raise StoreUnavailableError(f"{key} changed while it was read")
                return Brought(intake.finish(), exemplars, signature)
        except OSError as error:
            raise StoreError(f"cannot read {key}: {error.strerror}") from None

    def _read_exemplars(self, name: str) -> list[str] | None:
        try:
            with self._exemplars_of(name).open("rb") as file:
                data = file.read(MAX_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"cannot read the exemplars of {name}: {error.strerror}") from None
        if len(data) > MAX_BYTES:
            raise TooLargeError(f"the exemplars have more than {MAX_BYTES} bytes", param="exemplars")
        return parse_exemplars(data)

    def _exemplars_of(self, name: str) -> Path:
        return self._folder / f"{name.removesuffix(_FILES)}{_EXEMPLARS}"


def _is_expert(entry: os.DirEntry[str]) -> bool:
    return entry.name.endswith(_FILES) and not entry.name.startswith(".") and entry.is_file()
