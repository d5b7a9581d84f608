"""Who has been served how much: tenants share what the engine can do, by virtual token counters.

Each tenant has a counter of the service it got; whenever there is room for one more request, it goes to the tenant
served least (VTC: Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024). A tenant that has been away
does not save up for later: when it comes back, its counter is lifted to the least of those that wait.
"""

from __future__ import annotations

from collections import Counter

Tenant = str | None


class ServiceCounters:
    """Service in tokens: one for each that is run through the model, one more for each that is sampled. So an answer
    counts twice what a prompt does, as in VTC. Counters are kept for as long as the process lives, one per tenant."""

    def __init__(self) -> None:
        self._served: dict[Tenant, int] = {}
        self._waiting: Counter[Tenant] = Counter()
        self._last = 0
        """The counter of the tenant that ceased to wait last."""

    def served(self, tenant: Tenant) -> int:
        """The counter of a tenant that has asked."""
        return self._served[tenant]

    def wait(self, tenant: Tenant, *, again: bool = False) -> None:
        """A request begins to wait; `again` if it was preempted: its tenant has not been away."""
        if not self._waiting[tenant] and not again:
            floor = min((self._served[other] for other in self._waiting), default=self._last)
            self._served[tenant] = max(self._served.get(tenant, 0), floor)
        self._waiting[tenant] += 1

    def stop_waiting(self, tenant: Tenant) -> None:
        """A request runs, or has gone."""
        self._waiting[tenant] -= 1
        if not self._waiting[tenant]:
            del self._waiting[tenant]
            self._last = self._served[tenant]

    def charge(self, tenant: Tenant, tokens: int) -> None:
        """Note service."""
        self._served[tenant] += tokens
