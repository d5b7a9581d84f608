"""The audit log: who changed what, and what became of it. Appended to, and never rewritten.

One JSON object a line. It tells names, digests and roles, and neither keys nor prompts nor answers.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_BLOCK = 1 << 16
_FARTHEST = 64 << 20
"""Bytes from the end that are searched: a log may be years long."""


@dataclass(frozen=True)
class AuditEntry:
    """One attempt to change something.

    Attributes:
        action: what, by the table of the routes: `expert.publish`, `key.revoke`, ...
        target: of what, where that is known.
        key, tenant: who; the id of the key.
        outcome: done, refused or failed.
        code: why, where it was not done.
        request_id: as in the answer's header and in the log of the server; None from the command line.
        details: what else is worth knowing: digest, roles, visibility.
    """

    action: str
    target: str | None
    key: str
    tenant: str | None
    outcome: str
    code: str | None = None
    request_id: str | None = None
    details: Mapping[str, str] = field(default_factory=dict)


class AuditLog:
    """A file of entries. Thread-safe; several processes may append to one, and it may be moved away at any time.

    Args:
        path: made with its first entry, readable by its owner only.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._door = threading.Lock()

    def write(self, entry: AuditEntry) -> None:
        """Append an entry; it is on the disk when this returns.

        Raises:
            OSError: it cannot be written.
        """
        when = datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds")
        told = {"time": when.replace("+00:00", "Z")} | {k: v for k, v in asdict(entry).items() if v not in (None, {})}
        line = json.dumps(told, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"
        with self._door:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(descriptor, line)  # one call, so that lines of several processes never mingle
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def latest(self, limit: int, wanted: Mapping[str, str]) -> list[dict[str, Any]]:
        """The latest entries with these values, the latest first.

        Raises:
            OSError: the file cannot be read.
        """
        found = []
        for line in _backwards(self._path):
            try:
                entry: dict[str, Any] = json.loads(line)
            except ValueError:  # half a line: the disk was full, or the machine lost its power
                continue
            if all(entry.get(name) == value for name, value in wanted.items()):
                found.append(entry)
                if len(found) == limit:
                    break
        return found


def _backwards(path: Path) -> Iterator[bytes]:
    """The lines of a file from its end."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        at = file.seek(0, os.SEEK_END)
        least, rest = max(0, at - _FARTHEST), b""
        while at > least:
            size = min(_BLOCK, at - least)
            at -= size
            file.seek(at)
            first, *lines = (file.read(size) + rest).split(b"\n")
            rest = first
            yield from filter(None, reversed(lines))
        if at == 0 and rest:
            yield rest
