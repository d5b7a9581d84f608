"""Which store an address means."""

from __future__ import annotations

from pathlib import Path

from store.backends import BlobStore
from store.backends.disk import DiskStore
from store.backends.disk_ledger import DiskLedger
from store.backends.ledger import Ledger
from store.backends.redis import RedisStore
from store.backends.redis_ledger import RedisLedger
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
    return DiskStore(_folder(address))


def open_ledger(address: str) -> Ledger:
    """Open what servers of the store at an address share besides experts.

    Raises:
        InvalidRequestError: the address is malformed.
        StoreError: the store cannot be reached or used.
    """
    return RedisLedger(address) if address.startswith(SCHEMES) else DiskLedger(_folder(address) / "ledger")


def _folder(address: str) -> Path:
    if "://" in address:
        known = ", ".join(SCHEMES)
        raise InvalidRequestError(f"a store is a folder or an address with {known}", param="store")
    return Path(address)
