"""`switchyard push`: a small file in one request, a large one in pieces that survive a lost connection."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from server.client import Client, Json, ServerError, UnreachableError
from store.errors import SwitchyardError
from store.exemplars import parse_exemplars
from store.signature import read_beside

RESUMABLE_BYTES = 16 << 20
"""Files from this size on are sent in pieces."""
_ATTEMPTS = 8
"""Failures in a row, without a byte between them, until we give up."""
_LONGEST_WAIT = 30.0
_CHUNK = 1 << 18
_RETRIED = {"upload_offset_mismatch", "upload_in_use", "store_error", "store_unavailable"}

Wait = Callable[[float], None]


def push_file(
    client: Client,
    out: Console,
    file: Path,
    *,
    name: str | None,
    exemplars: Path | None,
    replace: bool = False,
    signature: str | None = None,
) -> tuple[Json, bool]:
    """Upload an expert file and publish it; progress goes to `out`. Returns its record, and whether it is new.

    Args:
        signature: of the file; None takes what stands beside it, if there is anything.

    Raises:
        ServerError: the server refused, or stayed away too long; what it has got it keeps for the next attempt.
        SwitchyardError: a file cannot be read.
    """
    signature = read_beside(file) if signature is None else signature
    given: dict[str, Any] = {"name": name, "replace": replace, "signature": signature}
    try:
        if file.stat().st_size < RESUMABLE_BYTES:
            with out.status(f"uploading {file.name}"):
                return client.push(file, exemplars=exemplars, **given)
        prompts = None if exemplars is None else parse_exemplars(exemplars.read_bytes())
        upload = upload_file(client, out, file)
    except OSError as error:
        raise SwitchyardError(f"cannot read {error.filename or file}: {error.strerror}") from None
    with out.status("checking and publishing"):
        return client.publish_upload(upload, exemplars=prompts, **given)


def upload_file(client: Client, out: Console, file: Path, *, wait: Wait = time.sleep) -> str:
    """Send a file in pieces, from wherever an earlier attempt ended. Returns the upload's id.

    Raises:
        ServerError: the server refused, or stayed away too long.
        OSError: the file cannot be read.
    """
    size = file.stat().st_size
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=out) as bars, file.open("rb") as data:
        bar = bars.add_task(f"reading {file.name}", total=size)
        digest = hashlib.sha256()
        for piece in _pieces(data, lambda done: bars.update(bar, completed=done)):
            digest.update(piece)
        upload = client.create_upload(_plain(file.name), size, digest.hexdigest())
        bars.reset(bar, description=f"uploading {file.name}", total=size, completed=upload["offset"])
        _send(client, upload, data, size, lambda done: bars.update(bar, completed=done), wait)
        bars.update(bar, completed=size)
    return str(upload["id"])


def _send(client: Client, upload: Json, data: BinaryIO, size: int, tell: Callable[[int], None], wait: Wait) -> None:
    offset, failures = int(upload["offset"]), 0
    while offset < size:
        try:
            data.seek(offset)
            client.append(upload["id"], offset, size - offset, _pieces(data, tell))
            return
        except ServerError as error:
            if not isinstance(error, UnreachableError) and error.code not in _RETRIED:
                raise
            wait(min(_LONGEST_WAIT, 0.25 * 2**failures))  # also for the server, to take up what is on its way
            before = offset
            offset = _offset_after(client, upload["id"], offset)
            failures = 0 if offset > before else failures + 1
            if failures >= _ATTEMPTS:
                raise
            tell(offset)


def _offset_after(client: Client, upload_id: str, offset: int) -> int:
    """What the server has got; what it had before, where it does not say."""
    try:
        return client.upload_offset(upload_id)
    except UnreachableError:
        return offset


def _pieces(data: BinaryIO, tell: Callable[[int], None]) -> Iterator[bytes]:
    while piece := data.read(_CHUNK):
        yield piece
        tell(data.tell())


def _plain(name: str) -> str:
    """A file's name in the letters that servers take."""
    kept = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "_" for letter in name)
    return kept.lstrip(".-")[:200] or "expert"
