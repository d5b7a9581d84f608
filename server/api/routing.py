"""What clients may ask of the routing of `model: auto`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from router.mix import MixMode
from router.options import RouteOptions
from server.api.wire import Text, Wire

MAX_NAMES = 256
"""Most names of a list. A client that may use more has better be given a tenant of its own."""

Names = Annotated[list[Text], Field(max_length=MAX_NAMES)]


class Routing(Wire):
    """Constraints on the route of a request; the server's settings decide what is left out."""

    allow: Names | None = Field(
        None, min_length=1, description="Only these experts (names or aliases), or the base, may answer."
    )
    deny: Names = Field([], description="These experts (names or aliases) may not answer.")
    max_experts: int | None = Field(None, ge=1, le=16, description="Most experts of a soft mix.")
    min_confidence: float = Field(
        0.0, ge=0, le=1, description="The base answers if the first expert has a smaller share of the votes."
    )
    mode: Annotated[MixMode | None, Field(strict=False)] = Field(
        None, description="`top1`, the one expert with most votes, or `soft`, a weighted mix."
    )
    sticky: bool = Field(True, description="Let a conversation stay with its experts unless its topic moves.")

    def to_options(self) -> RouteOptions:
        return RouteOptions(
            allow=None if self.allow is None else frozenset(self.allow),
            deny=frozenset(self.deny),
            max_experts=self.max_experts,
            min_confidence=self.min_confidence,
            mode=self.mode,
            sticky=self.sticky,
        )
