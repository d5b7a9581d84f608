"""Files of this machine that clients may name: inside folders that the settings allow, and nowhere else."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from store.errors import NotFoundError, StoreError

Put = Callable[[Path], int]

_WANTED = frozenset({"adapter_config.json", "model.safetensors.index.json"})
_WEIGHTS = ".safetensors"
_MOST_FILES = 256
"""Files of a folder that are looked at."""


class LocalFiles:
    """Reads below some folders. What is outside, or is not there, is one and the same to who asks.

    Args:
        roots: the folders; links in them may lead to each other, and not out.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = [Path(os.path.realpath(root)) for root in roots]

    def __bool__(self) -> bool:
        """Whether anything may be named."""
        return bool(self._roots)

    def parts(self, path: str) -> Mapping[str, Put]:
        """The files that make up an adapter or a fine-tune, each with what copies it somewhere and tells its size.

        Args:
            path: of a folder, or of one `.safetensors` file.

        Raises:
            NotFoundError: there is no such thing where it may be.
        """
        try:
            found = self._parts(path)
        except (OSError, ValueError):  # no permission, a name too long, no name at all
            found = {}
        if not any(name.endswith(_WEIGHTS) for name in found):
            raise _missing(path)
        return found

    def _parts(self, path: str) -> Mapping[str, Put]:
        found = Path(os.path.realpath(path))
        if not Path(path).is_absolute() or not self._allows(found):
            return {}
        if found.is_file():
            return {found.name: partial(self._copy, found)}
        names = sorted(name for name in os.listdir(found) if name in _WANTED or name.endswith(_WEIGHTS))
        return {name: partial(self._copy, found / name) for name in names[:_MOST_FILES]}

    def _allows(self, path: Path) -> bool:
        return any(path.is_relative_to(root) for root in self._roots)

    def _copy(self, source: Path, target: Path) -> int:
        """Copy what is allowed at the moment at which it is open: its path may have come to lead elsewhere since."""
        try:
            # Never hangs on a pipe that somebody has put there.
            descriptor = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            raise _missing(str(source)) from None
        with os.fdopen(descriptor, "rb") as file:
            if not self._allows(Path(os.path.realpath(f"/proc/self/fd/{descriptor}"))):
                raise _missing(str(source))
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise _missing(str(source))
            try:
                with target.open("xb") as copy:
                    shutil.copyfileobj(file, copy, 1 << 20)
                    return copy.tell()
            except OSError as error:
                raise StoreError(f"cannot copy the adapter: {error.strerror}") from error


def _missing(path: str) -> NotFoundError:
    return NotFoundError(f"there is no adapter at {path[:200]!r}", param="lora_path", code="adapter_not_found")
