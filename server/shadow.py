"""What routing would have made of requests that name their expert: asked about some of them, once they are answered."""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from router.decision import Decision
from router.options import ANY, RouteOptions
from server.choices import Part
from server.prompts import Prompt
from server.routing_metrics import RoutingMetrics
from store.access import Caller
from store.errors import EngineDeadError, SwitchyardError

log = logging.getLogger(__name__)

WAITING = 64
"""Most prompts that wait to be asked about; more are left out."""
_LONGEST = 1 << 16
"""Characters; longer prompts are left out, for what waits is kept in memory."""

Decide = Callable[[Prompt, RouteOptions, Caller], Awaitable[Decision]]


class Shadow:
    """Counts how often the router agrees with clients. No request waits for it, and none is answered otherwise.

    Args:
        share: of the prompts that are asked about, 0 to 1.
        decide: routes a prompt as it would be for that caller.
        knows: whether prompts can be routed to an expert of that name: nobody agrees on one that cannot be found.
    """

    def __init__(
        self,
        share: float,
        decide: Decide,
        knows: Callable[[str], bool],
        metrics: RoutingMetrics,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._share = share
        self._decide = decide
        self._knows = knows
        self._metrics = metrics
        self._draw = draw
        self._waiting: deque[tuple[Prompt, Part, Caller]] = deque()

    def consider(self, prompts: Sequence[Prompt], expert: Part, by: Caller) -> None:
        """Perhaps ask about the prompts of a request that named an expert, later."""
        for prompt in prompts:
            if len(self._waiting) < WAITING and self._draw() < self._share and prompt.characters <= _LONGEST:
                self._waiting.append((prompt, expert, by))

    async def work(self) -> None:
        """Ask about what waits, one after the other.

        Raises:
            EngineDeadError: the engine has failed.
        """
        while self._waiting:
            prompt, expert, by = self._waiting.popleft()
            if not self._knows(expert.name):
                continue
            try:
                decision = await self._decide(prompt, ANY, by)
            except EngineDeadError:
                raise
            except SwitchyardError as error:  # a conversation that asks nothing, a model that was removed meanwhile
                log.debug("no route for a prompt of %s: %s", expert.name, error.message)
                continue
            self._metrics.shadowed(expert.name, expert.digest, decision)
