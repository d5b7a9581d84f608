"""From the experts that a request names, or routing finds, to the mix that the engine runs."""

from __future__ import annotations

from collections.abc import Iterable

from server.choices import Part, Route
from store.lineage import Lineage
from store.mix import Mix
from store.patterns import Half

_TYPES = {Half.BF16: "bfloat16", Half.F16: "float16"}
"""How the engine calls them."""


def compose(
    lineage: Lineage, dtype: str, chosen: Iterable[tuple[str, str, float]], reason: str, distance: float | None = None
) -> Route:
    """The route of some experts, (name, digest, weight) each.

    What an expert stands on comes with it at the expert's own weight: its task vector is the sum of both. Two names may
    point to the same content, and two experts may stand on the same one: weights of one digest add up.

    Args:
        dtype: what the engine computes in, by torch's name: an expert that overwrites 16-bit weights is exact only in
            their own type and in float32, which holds all of them.

    Raises:
        ExpertRemovedError: an expert has just been removed.
        ExpertUnavailableError: what it stands on has.
    """
    parts: list[Part] = []
    weights: dict[str, float] = {}
    digests: set[str] = set()
    for name, digest, weight in chosen:
        below = lineage.below(digest)
        digests.add(digest)
        for each in (digest, *below):
            weights[each] = weights.get(each, 0.0) + weight
        if weight:
            parts.append(Part(name, digest, weight, below))
    mix = Mix.of(weights)
    exact: bool | None = None
    # Said only where some expert could be exact: of all others nobody expects it.
    if any(map(lineage.is_exact, digests)):
        holds = all(lineage.is_exact(each) and _holds(dtype, lineage.half(each)) for each in digests)
        exact = holds and [weight for _, weight in mix.parts] == [1.0]
    return Route(mix, tuple(parts), reason, distance, exact)


def _holds(dtype: str, half: Half | None) -> bool:
    """Whether a type holds every number of a 16-bit one; where that is not known, of either."""
    return dtype in ("float32", None if half is None else _TYPES[half])
