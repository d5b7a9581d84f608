"""From the experts that a request names, or routing finds, to the mix that the engine runs."""

from __future__ import annotations

from collections.abc import Iterable

from server.choices import Part, Route
from store.lineage import Lineage
from store.mix import Mix


def compose(
    lineage: Lineage, chosen: Iterable[tuple[str, str, float]], reason: str, distance: float | None = None
) -> Route:
    """The route of some experts, (name, digest, weight) each.

    What an expert stands on comes with it at the expert's own weight: its task vector is the sum of both. Two names may
    point to the same content, and two experts may stand on the same one: weights of one digest add up.

    Raises:
        ExpertRemovedError: an expert has just been removed.
        ExpertUnavailableError: what it stands on has.
    """
    parts: list[Part] = []
    weights: dict[str, float] = {}
    exact: list[bool] = []
    for name, digest, weight in chosen:
        below = lineage.below(digest)
        exact.append(lineage.is_exact(digest))
        for each in (digest, *below):
            weights[each] = weights.get(each, 0.0) + weight
        if weight:
            parts.append(Part(name, digest, weight, below))
    mix = Mix.of(weights)
    # Said only where some expert could be exact: of all others nobody expects it.
    is_exact = all(exact) and [weight for _, weight in mix.parts] == [1.0] if any(exact) else None
    return Route(mix, tuple(parts), reason, distance, is_exact)
