"""Neighbours → votes → weights (AFS Eq. 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum

from router.index import LEAST_REACH, Neighbour


class MixMode(StrEnum):
    TOP1 = "top1"
    """The expert with most votes answers alone, as in the authors' code for language models."""
    SOFT = "soft"
    """Experts answer together, weighted by their votes."""


class Votes(StrEnum):
    COUNT = "count"
    """Every neighbour has one vote (AFS Eq. 5)."""
    INVERSE = "inverse"
    """A neighbour's vote weighs 1 / distance, as in the loss that AFS trains its metric by."""


def voters(neighbours: Sequence[Neighbour]) -> list[Neighbour]:
    """The neighbours that may vote; none if the prompt is in nobody's domain.

    The nearest centre of an expert decides whether the prompt is in a domain at all. Then every neighbour votes to
    whose expert's domain the prompt belongs, and the background. Bare counting would let an expert with three centres
    always lose against one with twenty: after its three nearest centres come far ones of the other, and outvote them.

    Args:
        neighbours: nearest first.
    """
    nearest = next((neighbour for neighbour in neighbours if not neighbour.is_background), None)
    if nearest is None or not nearest.is_within_reach:
        return []
    return [neighbour for neighbour in neighbours if neighbour.is_within_reach]


def tally(voters: Sequence[Neighbour], votes: Votes) -> dict[str, float]:
    """Votes by digest, most first; with equally many, the one whose centre is nearest.

    Nobody casts more votes than the candidate with the fewest centres has: an expert of one exemplar cannot win a
    count against twenty centres, however near it is.

    Args:
        voters: nearest first.
    """
    ballots = min((voter.centres for voter in voters), default=0)
    cast: dict[str, list[float]] = {}
    for voter in voters:
        weight = 1.0 if votes is Votes.COUNT else 1.0 / max(voter.distance, LEAST_REACH)
        if len(own := cast.setdefault(voter.digest, [])) < ballots:
            own.append(weight)
    found = {digest: sum(own) for digest, own in cast.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def weigh(ranking: Mapping[str, float], *, mode: MixMode, min_share: float, steps: int) -> dict[str, float]:
    """Weights of the chosen experts, largest first; they sum to 1.

    Args:
        ranking: votes of at least one expert by digest, most first.
        min_share: in soft mode, experts with a smaller share of the votes drop out; the first one stays.
        steps: in soft mode, weights are multiples of 1/steps, so that requests share few distinct mixes.

    Returns:
        `{expert digest: weight}`.
    """
    first = next(iter(ranking))
    if mode is MixMode.TOP1:
        return {first: 1.0}
    least = min_share * sum(ranking.values())
    return _rounded({digest: votes for digest, votes in ranking.items() if digest == first or votes >= least}, steps)


def _rounded(ranking: Mapping[str, float], steps: int) -> dict[str, float]:
    """Shares of the votes as multiples of 1/steps by the largest remainder, so that they still sum to 1."""
    total = sum(ranking.values())
    shares = {digest: votes * steps / total for digest, votes in ranking.items()}
    whole = {digest: int(share) for digest, share in shares.items()}
    for digest in sorted(shares, key=lambda digest: whole[digest] - shares[digest])[: steps - sum(whole.values())]:
        whole[digest] += 1
    return {digest: count / steps for digest, count in whole.items() if count}
