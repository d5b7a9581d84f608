"""Neighbours → votes → weights (AFS Eq. 5)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from enum import StrEnum

from router.index import Neighbour


class MixMode(StrEnum):
    TOP1 = "top1"
    """The expert with most votes answers alone, as in the authors' code for language models."""
    SOFT = "soft"
    """Experts answer together, weighted by their votes."""


def voters(neighbours: Sequence[Neighbour]) -> list[Neighbour]:
    """The neighbours that may vote; none if the prompt is in nobody's domain.

    The nearest centre decides whether the prompt is in a domain at all. Then every neighbour votes to whose expert's
    domain the prompt belongs. Bare counting would let an expert with three centres always lose against one with
    twenty: after its three nearest centres come far ones of the other, and outvote them.

    Args:
        neighbours: nearest first.
    """
    if not neighbours or not neighbours[0].is_within_reach:
        return []
    return [neighbour for neighbour in neighbours if neighbour.is_within_reach]


def weigh(voters: Sequence[Neighbour], *, mode: MixMode, min_share: float, steps: int) -> dict[str, float]:
    """Weights of the experts that the voters choose, largest first; they sum to 1.

    Args:
        voters: at least one, nearest first. Experts with equally many votes rank by their nearest centre.
        min_share: in soft mode, experts with a smaller share of the votes drop out; the first one stays.
        steps: in soft mode, weights are multiples of 1/steps, so that requests share few distinct mixes.

    Returns:
        `{expert digest: weight}`.
    """
    # Counter.most_common keeps the order of first occurrence among equals: the nearest first.
    ranking = Counter(voter.digest for voter in voters).most_common()
    if mode is MixMode.TOP1:
        return {ranking[0][0]: 1.0}
    kept = [(digest, votes) for i, (digest, votes) in enumerate(ranking) if i == 0 or votes >= min_share * len(voters)]
    return _rounded(kept, steps)


def _rounded(ranking: Sequence[tuple[str, int]], steps: int) -> dict[str, float]:
    """Shares of the votes as multiples of 1/steps by the largest remainder, so that they still sum to 1."""
    total = sum(votes for _, votes in ranking)
    whole = [votes * steps // total for _, votes in ranking]
    remainder = [votes * steps % total for _, votes in ranking]
    for i in sorted(range(len(ranking)), key=lambda i: -remainder[i])[: steps - sum(whole)]:
        whole[i] += 1
    return {digest: count / steps for (digest, _), count in zip(ranking, whole, strict=True) if count}
