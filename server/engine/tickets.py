"""Requests that wait for their experts, in order of their tenants' turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from server.engine.fairness import Tenant
from server.engine.tenant_lines import TenantLines
from store.errors import SwitchyardError
from store.mix import Mix

Ready = Callable[[SwitchyardError | None], None]


@dataclass(eq=False)
class Ticket:
    """A mix that waits for its experts."""

    mix: Mix
    ready: Ready
    since: float
    tenant: Tenant = None
    missing: set[str] = field(default_factory=set)

    @property
    def digests(self) -> set[str]:
        return {digest for digest, _ in self.mix.parts}


class Tickets:
    """Tickets that have not been granted yet. For the engine's thread; `seconds` for any."""

    def __init__(self) -> None:
        self._lines: TenantLines[Ticket] = TenantLines()

    def __iter__(self) -> Iterator[Ticket]:
        """In the order in which they will be granted."""
        return iter(self._lines)

    @property
    def first(self) -> Ticket | None:
        """Whose turn it is, until it is granted or gone."""
        first = self._lines.first()
        return None if first is None else first[0]

    def add(self, ticket: Ticket) -> None:
        self._lines.add(ticket, ticket.tenant)

    def remove(self, ticket: Ticket) -> None:
        self._lines.remove(ticket, ticket.tenant)

    def wanting(self, digest: str) -> list[Ticket]:
        """Those that wait for an expert."""
        return [ticket for ticket in self if digest in ticket.digests]

    def seconds(self, now: float) -> Mapping[Mix, float]:
        """Their mixes, each with the seconds that the first of it has waited."""
        latest_first = sorted(self, key=lambda ticket: ticket.since, reverse=True)
        return {ticket.mix: now - ticket.since for ticket in latest_first}
