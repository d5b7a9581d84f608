"""Expert files in buckets and repositories: which addresses may be read, what lies there, and a bounded download.

Addresses are the operator's, never a request's, and even those are read only below prefixes that are allowed.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from store.errors import (
    InvalidRequestError,
    MissingPackageError,
    NotFoundError,
    StoreUnavailableError,
    SwitchyardError,
    TooLargeError,
)
from store.intake import Intake, Received

EXPERTS = ".safetensors"
_SCHEMES = {
    "hf": "huggingface_hub",
    "s3": "s3fs",
    "gs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "file": "",
    "memory": "",
}
"""What may stand before `://`, and the package that reads it. No web addresses: where they lead to, others decide."""
_SEGMENT = re.compile(r"[A-Za-z0-9_@=+.-]+")
_ROOTED = ("file", "memory")
_MAX_URL = 1000
_CONNECT_SECONDS, _READ_SECONDS = 10, 60
_PIECE = 1 << 20
_BLOCK = 4 << 20
"""Bytes of one request: what a download may have in memory."""
_TELLING = ("ETag", "etag", "md5Hash", "blob_id", "size", "mtime", "ino", "LastModified", "last_modified", "created")
"""Properties by which stores tell that a file has changed."""


@dataclass(frozen=True)
class Location:
    """A place in a store: `scheme://a/b/c`.

    Attributes:
        segments: what slashes separate; none is empty, `.` or `..`.
    """

    scheme: str
    segments: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.scheme}://{'/' if self.scheme in _ROOTED else ''}{'/'.join(self.segments)}"

    @property
    def folder(self) -> Location:
        """Itself, or where the file lies that it names."""
        return Location(self.scheme, self.segments[:-1]) if self.file else self

    @property
    def file(self) -> str | None:
        """Name of the expert file that it names; None if it means all that lie there."""
        return self.segments[-1] if self.segments and self.segments[-1].endswith(EXPERTS) else None

    def __truediv__(self, name: str) -> Location:
        return parse_location(f"{self}/{name}")

    def is_below(self, prefix: Location) -> bool:
        """Whether it is the prefix or lies in it. A repository's revisions (`repo@v2`) lie in the repository."""
        own = self.segments[: len(prefix.segments)]
        if self.scheme != prefix.scheme or len(own) < len(prefix.segments):
            return False
        return all(
            mine == theirs or (self.scheme == "hf" and mine.partition("@")[0] == theirs)
            for mine, theirs in zip(own, prefix.segments, strict=True)
        )


def parse_location(url: str) -> Location:
    """Read an address strictly: it must have one reading, here and in the library that follows it.

    Raises:
        InvalidRequestError: it is malformed, or of a kind that is not read (`param` is "url").
    """
    scheme, separator, rest = url.partition("://")
    if len(url) > _MAX_URL or not separator or scheme not in _SCHEMES:
        known = ", ".join(f"{name}://" for name in _SCHEMES)
        raise InvalidRequestError(f"{url[:100]!r} is no address with {known}", param="url")
    segments = rest.removeprefix("/" if scheme in _ROOTED else "").removesuffix("/").split("/")
    for segment in segments:
        if segment in (".", "..") or not _SEGMENT.fullmatch(segment):
            raise InvalidRequestError(
                f"{url[:100]!r} has the part {segment[:64]!r}: parts are of letters, digits and _ @ = + . -",
                param="url",
            )
    return Location(scheme, tuple(segments))


def check_allowed(location: Location, allowed: Iterable[str]) -> None:
    """Whether an address may be read.

    Raises:
        InvalidRequestError: no allowed prefix holds it, or one is malformed.
    """
    prefixes = [parse_location(prefix) for prefix in allowed]
    if not any(location.is_below(prefix) for prefix in prefixes):
        raise InvalidRequestError(
            f"{location} may not be read: allow it, or a prefix of it, with hub_allow (SWITCHYARD_HUB_ALLOW)",
            param="hub_allow",
        )


class RemoteFolder:
    """One place in a bucket or a repository. What is below it is not looked into. Blocks; for threads.

    Raises:
        MissingPackageError: what reads such addresses is not installed.
    """

    def __init__(self, location: Location) -> None:
        self.location = location.folder
        self._only = location.file
        self._files = _filesystem(location.scheme)

    def list(self) -> dict[str, str]:
        """Every file that lies there, or the one and what belongs to it: name → a stamp that changes with it.

        Raises:
            NotFoundError: there is nothing.
            StoreUnavailableError: it cannot be read.
        """
        stem = None if self._only is None else self._only.removesuffix(EXPERTS)
        with _reported(self.location):
            self._files.invalidate_cache()
            found = self._files.ls(_path(self.location), detail=True)
        return {
            name: _stamp(entry)
            for entry in found
            if entry["type"] == "file"
            and (name := str(entry["name"]).rpartition("/")[2])
            and (stem is None or name.startswith(f"{stem}."))
        }

    def download(
        self, name: str, folder: Path, *, max_bytes: int, seconds: float, tell: Callable[[int, int], None] | None = None
    ) -> Received:
        """Bring one file into a folder; nothing is left if that fails.

        Args:
            max_bytes: where it is broken off.
            seconds: after which it is given up.
            tell: called with bytes that are there, and the size.

        Raises:
            TooLargeError: it is larger.
            NotFoundError, StoreUnavailableError: it is not there, cannot be read, or takes too long.
            StorageFullError, StoreError: it cannot be written.
        """
        location, deadline = self.location / name, time.monotonic() + seconds
        with Intake(folder, max_bytes=max_bytes) as intake, _reported(location):
            with self._files.open(_path(location), "rb", block_size=_BLOCK) as file:
                size = int(file.size or 0)
                if size > max_bytes:
                    raise TooLargeError(f"{location} has {size} bytes, at most {max_bytes} are taken", param="file")
                done = 0
                while piece := file.read(_PIECE):
                    intake.write(piece)
                    done += len(piece)
                    if tell is not None:
                        tell(done, size)
                    if time.monotonic() > deadline:
                        raise StoreUnavailableError(f"{location} took more than {seconds:.0f} s")
            return intake.finish()

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """The bytes of a small file.

        Raises:
            TooLargeError: it is larger.
            NotFoundError, StoreUnavailableError: it is not there, or cannot be read.
        """
        location = self.location / name
        with _reported(location), self._files.open(_path(location), "rb", block_size=_BLOCK) as file:
            data: bytes = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise TooLargeError(f"{location} has more than {max_bytes} bytes", param=name)
        return data


def _filesystem(scheme: str) -> Any:
    import fsspec

    options: dict[str, Any] = {}
    if scheme == "s3":
        limits = {"connect_timeout": _CONNECT_SECONDS, "read_timeout": _READ_SECONDS, "retries": {"max_attempts": 3}}
        options = {"config_kwargs": limits, "use_listings_cache": False, "skip_instance_cache": True}
    elif scheme == "hf":
        options = {"endpoint": os.environ.get("HF_ENDPOINT"), "skip_instance_cache": True}
    try:
        return fsspec.filesystem(scheme, **options)
    except ImportError:
        extra = "'switchyard[s3]'" if scheme == "s3" else _SCHEMES[scheme]
        raise MissingPackageError(f"{scheme}:// needs the package {_SCHEMES[scheme]}: pip install {extra}") from None


def _path(location: Location) -> str:
    """As the library wants it: without the scheme."""
    return f"{'/' if location.scheme in _ROOTED else ''}{'/'.join(location.segments)}"


def _stamp(entry: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={entry[key]}" for key in _TELLING if entry.get(key) is not None)


@contextmanager
def _reported(location: Location) -> Iterator[None]:
    """Turn whatever a library raises into our errors."""
    try:
        yield
    except SwitchyardError:
        raise
    except FileNotFoundError:
        raise NotFoundError(f"there is nothing at {location}", param="url", code="not_found") from None
    except Exception as error:  # every store brings a tree of its own
        what = " ".join(str(error).split())[:200]
        raise StoreUnavailableError(f"cannot read {location}: {type(error).__name__}: {what}") from error
