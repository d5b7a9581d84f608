"""What one request may ask of its routing."""

from __future__ import annotations

from dataclasses import dataclass, replace

from router.mix import MixMode


@dataclass(frozen=True)
class RouteOptions:
    """Constraints of a client on the route of its request.

    Attributes:
        allow: only these experts may answer; None allows all.
        deny: these may not.
        max_experts: most experts of a mix; None leaves it to the mode.
        min_confidence: the base answers if the first expert has a smaller share of the votes.
        mode: instead of the server's.
        sticky: whether a conversation stays with its experts unless its topic moves.
        existing: only these experts exist for whom asks, whatever it allows; None: all do.
    """

    allow: frozenset[str] | None = None
    deny: frozenset[str] = frozenset()
    max_experts: int | None = None
    min_confidence: float = 0.0
    mode: MixMode | None = None
    sticky: bool = True
    existing: frozenset[str] | None = None

    def sees(self, name: str) -> bool:
        """Whether an expert of that name may be found."""
        asked_for = self.allow is None or name in self.allow
        return asked_for and name not in self.deny and (self.existing is None or name in self.existing)

    def within(self, names: frozenset[str]) -> RouteOptions:
        """The same among these experts only: for whom no others exist."""
        return replace(self, existing=names if self.existing is None else self.existing & names)

    @property
    def sees_all(self) -> bool:
        return not self.is_constrained and self.existing is None

    @property
    def is_constrained(self) -> bool:
        """Whether the request itself says which experts may answer."""
        return self.allow is not None or bool(self.deny)


ANY = RouteOptions()
"""No constraints."""
