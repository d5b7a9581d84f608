"""`switchyard pull`: expert files out of a bucket or a repository, checked here, and pushed to a server."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from server.client import Client, Json
from server.pushing import push_file
from store.errors import InvalidRequestError
from store.exemplars import MAX_BYTES
from store.expert_file import read_header
from store.remote import EXPERTS, RemoteFolder, check_allowed, parse_location
from store.signature import MAX_BYTES as MAX_SIGNATURE_BYTES
from store.signature import SUFFIX, decode_signature


def pull(
    client: Client,
    out: Console,
    url: str,
    allowed: Sequence[str],
    *,
    name: str | None,
    replace: bool,
    max_bytes: int,
    seconds: float,
) -> list[tuple[Json, bool]]:
    """Download what an address names, and push it; progress goes to `out`. Returns records, and whether they are new.

    Args:
        url: an expert file, or a place where some lie.
        allowed: prefixes; only what is below one of them is read.
        name: what to call it; only where there is one file.
        max_bytes, seconds: of a download.

    Raises:
        InvalidRequestError: the address is malformed or not allowed, or names several files and there is one name.
        NotFoundError: there is no expert file.
        ExpertFileError: a file is none.
        SwitchyardError: it cannot be read, or the server refuses.
    """
    location = parse_location(url)
    check_allowed(location, allowed)
    folder = RemoteFolder(location)
    there = folder.list()
    files = sorted(file for file in there if file.endswith(EXPERTS))
    if not files:
        raise InvalidRequestError(f"there is no expert file (*{EXPERTS}) at {location}", param="url")
    if name is not None and len(files) > 1:
        raise InvalidRequestError(f"{location} holds {len(files)} experts: one name is not enough", param="name")
    pushed = []
    for file in files:
        with tempfile.TemporaryDirectory(prefix="switchyard-") as scratch:
            path = _download(folder, out, file, Path(scratch), max_bytes, seconds)
            exemplars = _beside(folder, there, f"{file.removesuffix(EXPERTS)}.jsonl", Path(scratch), MAX_BYTES)
            signature = f"{file}{SUFFIX}"
            signed = None
            if signature in there:
                signed = decode_signature(folder.read(signature, max_bytes=MAX_SIGNATURE_BYTES))
            called = name or read_header(path).name or file.removesuffix(EXPERTS)
            pushed.append(
                push_file(client, out, path, name=called, exemplars=exemplars, replace=replace, signature=signed)
            )
    return pushed


def _download(folder: RemoteFolder, out: Console, file: str, scratch: Path, max_bytes: int, seconds: float) -> Path:
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=out) as bars:
        bar = bars.add_task(f"downloading {file}", total=None)
        received = folder.download(
            file,
            scratch,
            max_bytes=max_bytes,
            seconds=seconds,
            tell=lambda done, size: bars.update(bar, completed=done, total=size),
        )
    return received.path.replace(scratch / file)


def _beside(folder: RemoteFolder, there: dict[str, str], file: str, scratch: Path, max_bytes: int) -> Path | None:
    if file not in there:
        return None
    path = scratch / file
    path.write_bytes(folder.read(file, max_bytes=max_bytes))
    return path
