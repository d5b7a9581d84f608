"""Documents of one kind in a ledger, as values: read again when something has changed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from store.backends.ledger import Ledger

T = TypeVar("T")


class Documents(Generic[T]):
    """Thread-safe; sees at once what other servers and the command line change.

    Args:
        parse: makes a value of a name and its bytes; does not raise.
    """

    def __init__(self, ledger: Ledger, kind: str, parse: Callable[[str, bytes], T]) -> None:
        self._ledger = ledger
        self._kind = kind
        self._parse = parse
        self._reading = threading.Lock()
        self._edition: int | None = None
        self._known: Mapping[str, T] = {}

    def all(self) -> Mapping[str, T]:
        """All of them by name. Takes microseconds where nothing has changed.

        Raises:
            StoreError: the ledger failed.
        """
        edition = self._ledger.edition()
        if edition == self._edition:
            return self._known
        with self._reading:
            found = {name: self._parse(name, data) for name, data in self._ledger.documents(self._kind).items()}
            self._known, self._edition = found, edition
        return found

    def put(self, name: str, data: bytes, *, absent: bool = False) -> bool:
        """See `Ledger.put`."""
        return self._ledger.put(self._kind, name, data, absent=absent)

    def delete(self, name: str) -> bool:
        """See `Ledger.delete`."""
        return self._ledger.delete(self._kind, name)
