"""Which store an address means."""

from __future__ import annotations

from pathlib import Path

from store.backends import BlobStore
from store.backends.disk import DiskStore
from store.backends.redis import RedisStore
from store.backends.redis_link import SCHEMES
from store.errors import InvalidRequestError


def open_store(address: str, *, cache: Path, cache_bytes: int) -> BlobStore:
    """Open the store at an address: redis://HOST:PORT/DB (rediss://, unix://), or a folder.

    Args:
        cache: folder of the disk cache in front of Redis.
        cache_bytes: most bytes in it.

    Raises:
        InvalidRequestError: the address is malformed.
        StoreError: the store cannot be reached or used.
    """
    if address.startswith(SCHEMES):
        return RedisStore(address, cache, cache_bytes=cache_bytes)
    if "://" in address:
        known = ", ".join(SCHEMES)
        raise InvalidRequestError(f"a store is a folder or an address with {known}", param="store")
    return DiskStore(Path(address))
