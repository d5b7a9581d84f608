"""The console's static files, read once: what is not among them cannot be asked for, whatever a path says."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

PAGE = "index.html"

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}


@dataclass(frozen=True)
class StaticFile:
    """One file as it is sent; `etag` is a strong one, of its bytes."""

    body: bytes
    media_type: str
    etag: str


def static_files() -> Mapping[str, StaticFile]:
    """Every file of the console by name; there are no folders."""
    found = {}
    for path in files("server.console").joinpath("static").iterdir():
        kind = _TYPES.get(path.name.rpartition(".")[2])
        if kind is not None and path.is_file():
            body = path.read_bytes()
            found[path.name] = StaticFile(body, kind, f'"{hashlib.sha256(body).hexdigest()[:32]}"')
    return found
