"""Who has been served how much: tenants share what the engine can do, by virtual token counters.

Each tenant has a counter of the service it got; whenever there is room for one more request, it goes to the tenant
served least (VTC: Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024). A tenant that has been away
does not save up for later: when it comes back, its counter is lifted to the least of the others that wait, or run if
none waits. What a tenant gets beside others, of room that they have no use for, counts as well, and may keep its
counter ahead for ever: so a few turns and places go to whoever has waited longest.
"""

from __future__ import annotations

from collections import Counter

Tenant = str | None

LONGEST_WAIT = 16
"""One of so many turns, and of so many requests that begin, is that of who waited longest, whatever its tenant got."""


class ServiceCounters:
    """Service in tokens: one for each that is run through the model, one more for each that is sampled. So an answer
    counts twice what a prompt does, as in VTC. Counters are kept for as long as the process lives, one per tenant."""

    def __init__(self) -> None:
        self._served: dict[Tenant, int] = {}
        self._waiting: Counter[Tenant] = Counter()
        self._present: Counter[Tenant] = Counter()
        """Requests that wait or run."""
        self._last = 0
        """The counter of the tenant that left last."""

    def served(self, tenant: Tenant) -> int:
        """The counter of a tenant that has asked."""
        return self._served[tenant]

    def wait(self, tenant: Tenant, *, again: bool = False) -> None:
        """A request begins to wait; `again` if it was preempted: its tenant has not been away."""
        if not again:
            if not self._waiting[tenant]:
                others = [other for other in self._present if other != tenant]
                others = [other for other in others if self._waiting[other]] or others
                floor = min(map(self.served, others), default=0 if self._present[tenant] else self._last)
                self._served[tenant] = max(self._served.get(tenant, 0), floor)
            self._present[tenant] += 1
        self._waiting[tenant] += 1

    def stop_waiting(self, tenant: Tenant) -> None:
        """A request runs, or is about to leave."""
        self._waiting[tenant] -= 1

    def leave(self, tenant: Tenant) -> None:
        """A request that does not wait has gone."""
        self._present[tenant] -= 1
        if not self._present[tenant]:
            del self._present[tenant]
            self._last = self._served[tenant]

    def charge(self, tenant: Tenant, tokens: int) -> None:
        """Note service."""
        self._served[tenant] += tokens
