"""What several tenants wait for, who are served in turn; each in order of arrival."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import zip_longest
from typing import Generic, TypeVar

from server.engine.fairness import Tenant

Item = TypeVar("Item")


class TenantLines(Generic[Item]):
    """One line per tenant that waits. To be changed by one thread at a time; may be iterated by any, meanwhile too."""

    def __init__(self) -> None:
        self._lines: dict[Tenant, deque[Item]] = {}
        """The first item of the first line is next; it stays so until it is removed, whoever comes."""

    def __iter__(self) -> Iterator[Item]:
        """As they would be served if nobody else came."""
        lines = [[*line] for line in [*self._lines.values()]]
        return (item for rank in zip_longest(*lines) for item in rank if item is not None)

    def first(self) -> tuple[Item, Tenant] | None:
        """What is next, and whose line it is in."""
        tenant, line = next(iter(self._lines.items()), (None, None))
        return None if line is None else (line[0], tenant)

    def add(self, item: Item, tenant: Tenant) -> None:
        """Put an item at the end of its tenant's line; that of a tenant who did not wait is the last one."""
        self._lines.setdefault(tenant, deque()).append(item)

    def remove(self, item: Item, tenant: Tenant, *, ends_turn: bool = True) -> None:
        """Take an item out of a line, wherever it is.

        Args:
            ends_turn: if it is the next one of all, its tenant goes behind the others.
        """
        was_next = self.first() == (item, tenant)
        line = self._lines[tenant]
        line.remove(item)
        if not line or (was_next and ends_turn):
            del self._lines[tenant]
        if line:
            self._lines.setdefault(tenant, line)
