"""What the router decided for a prompt, and why, in words and in numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

from router.index import Neighbour
from router.mix import MixMode, voters, weigh
from store.mix import BASE_MIX, Mix


class Reason(StrEnum):
    MATCHED = "matched"
    """The prompt lies in the domain of the experts of the mix."""
    OUT_OF_DOMAIN = "out_of_domain"
    """The prompt is farther from every expert's exemplars than their own kind is: the base answers."""
    NO_EXPERTS = "no_experts"
    """No expert with exemplars is there to be found: the base answers."""
    EMPTY_PROMPT = "empty_prompt"
    """There is no text to route by: the base answers."""


@dataclass(frozen=True)
class Decision:
    """A routing decision.

    Attributes:
        mix: what answers; empty for the base.
        parts: (expert name, digest, weight) of the mix, largest weight first. Of several names for a digest, the one
            whose centre is nearest.
        code: why, for programs.
        reason: why, in a sentence.
        distance: from the prompt to the nearest centre of all, about 1 for a typical exemplar; None without a search.
        threshold: how far the domain of that centre's expert reaches: the prompt is out of domain if `distance`
            exceeds it.
        neighbours: the nearest centres, nearest first, whether they voted or not.
        votes: expert name → votes. A neighbour votes if the prompt lies within its expert's reach.
    """

    mix: Mix
    parts: tuple[tuple[str, str, float], ...]
    code: Reason
    reason: str
    distance: float | None = None
    threshold: float | None = None
    neighbours: tuple[Neighbour, ...] = ()
    votes: dict[str, int] = field(default_factory=dict)


EMPTY_PROMPT = Decision(BASE_MIX, (), Reason.EMPTY_PROMPT, "the prompt is empty, so the base answers")
NO_EXPERTS = Decision(BASE_MIX, (), Reason.NO_EXPERTS, "no expert has exemplars to be found by, so the base answers")


def decide(neighbours: tuple[Neighbour, ...], *, mode: MixMode, min_share: float, steps: int) -> Decision:
    """Decide by the nearest centres, nearest first; `mode`, `min_share` and `steps` as in `router.mix.weigh`."""
    if not neighbours:
        return NO_EXPERTS
    nearest = neighbours[0]
    electorate = voters(neighbours)
    if not electorate:
        return Decision(
            BASE_MIX,
            (),
            Reason.OUT_OF_DOMAIN,
            f"the prompt is unlike every expert's exemplars, so the base answers: the nearest are those of "
            f"{nearest.name!r}, at distance {nearest.distance:.3g}, but its domain ends at {nearest.reach:.3g}",
            nearest.distance,
            nearest.reach,
            neighbours,
        )
    weights = weigh(electorate, mode=mode, min_share=min_share, steps=steps)
    names: dict[str, str] = {}
    for voter in electorate:
        names.setdefault(voter.digest, voter.name)
    parts = tuple((names[digest], digest, weight) for digest, weight in weights.items())
    votes = dict(Counter(voter.name for voter in electorate).most_common())
    chosen = " and ".join(f"{name!r} ({weight:.0%})" if len(parts) > 1 else repr(name) for name, _, weight in parts)
    tally = ", ".join(f"{count} by {name!r}" for name, count in votes.items())
    return Decision(
        Mix.of(weights),
        parts,
        Reason.MATCHED,
        f"the prompt is in the domain of {chosen}: {len(electorate)} of {len(neighbours)} nearest centres vote "
        f"({tally}), the nearest at distance {nearest.distance:.3g} of at most {nearest.reach:.3g}",
        nearest.distance,
        nearest.reach,
        neighbours,
        votes,
    )
