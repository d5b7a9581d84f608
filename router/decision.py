"""What the router decided for a prompt, and why, in words and in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice

from router.features import Features
from router.index import BACKGROUND, Neighbour
from router.mix import MixMode, Votes, tally, voters, weigh
from router.options import ANY, RouteOptions
from store.mix import BASE_MIX, Mix


class Reason(StrEnum):
    MATCHED = "matched"
    """The prompt lies in the domain of the experts of the mix."""
    KEPT = "kept"
    """The conversation stays with the experts of its earlier turns; see `router.conversation`."""
    OUT_OF_DOMAIN = "out_of_domain"
    """The prompt is farther from every expert's exemplars than their own kind is, or nearer to what is no expert's."""
    LOW_CONFIDENCE = "low_confidence"
    """The first expert has a smaller share of the votes than the request asks for: the base answers."""
    NO_EXPERTS = "no_experts"
    """No expert with exemplars is there to be found: the base answers."""
    EMPTY_PROMPT = "empty_prompt"
    """There is no text to route by: the base answers."""


@dataclass(frozen=True)
class Rules:
    """How neighbours become a mix; see `router.mix`."""

    mode: MixMode
    votes: Votes
    min_share: float
    steps: int


@dataclass(frozen=True)
class Decision:
    """A routing decision.

    Attributes:
        mix: what answers; empty for the base.
        parts: (expert name, digest, weight) of the mix, largest weight first. Of several names for a digest, the one
            whose centre is nearest.
        code: why, for programs.
        reason: why, in a sentence.
        distance: from the prompt to the nearest centre of an expert, about 1 for a typical exemplar; None without a
            search.
        threshold: how far the domain of that centre's expert reaches: the prompt is out of domain if `distance`
            exceeds it.
        confidence: the first expert's share of the votes, the background's included; 0 if nobody could vote.
        neighbours: the nearest centres, nearest first, whether they voted or not.
        votes: expert name → neighbours that voted. A neighbour votes if the prompt lies within its expert's reach.
        features: `[e]`, of the prompt; None without a search. Equal decisions need not have equal ones.
    """

    mix: Mix
    parts: tuple[tuple[str, str, float], ...]
    code: Reason
    reason: str
    distance: float | None = None
    threshold: float | None = None
    confidence: float | None = None
    neighbours: tuple[Neighbour, ...] = ()
    votes: dict[str, int] = field(default_factory=dict)
    features: Features | None = field(default=None, compare=False, repr=False)


EMPTY_PROMPT = Decision(BASE_MIX, (), Reason.EMPTY_PROMPT, "the prompt is empty, so the base answers")
NO_EXPERTS = Decision(BASE_MIX, (), Reason.NO_EXPERTS, "no expert has exemplars to be found by, so the base answers")
NONE_ALLOWED = Decision(
    BASE_MIX, (), Reason.NO_EXPERTS, "no expert that the request allows has exemplars, so the base answers"
)


def decide(neighbours: tuple[Neighbour, ...], rules: Rules, options: RouteOptions = ANY) -> Decision:
    """Decide by the nearest centres, nearest first, under the constraints of the request."""
    nearest = next((neighbour for neighbour in neighbours if not neighbour.is_background), None)
    if nearest is None:
        return _nothing_but_background(neighbours) if neighbours else NO_EXPERTS
    electorate = voters(neighbours)
    if not electorate:
        return _to_base(
            neighbours,
            Reason.OUT_OF_DOMAIN,
            f"the prompt is unlike every expert's exemplars, so the base answers: the nearest are those of "
            f"{nearest.name!r}, at distance {nearest.distance:.3g}, but its domain ends at {nearest.reach:.3g}",
        )
    ranking = tally(electorate, rules.votes)
    total = sum(ranking.values())
    against = ranking.pop(BACKGROUND, 0.0)
    confidence = next(iter(ranking.values())) / total
    votes = dict(Counter(voter.name for voter in electorate if not voter.is_background).most_common())
    if against >= next(iter(ranking.values())):
        return _to_base(
            neighbours,
            Reason.OUT_OF_DOMAIN,
            f"the prompt is more like general text than like any expert's exemplars, so the base answers: the nearest "
            f"are those of {nearest.name!r}, at distance {nearest.distance:.3g}, but {_most(confidence)}",
            confidence,
            votes,
        )
    if confidence < options.min_confidence:
        return _to_base(
            neighbours,
            Reason.LOW_CONFIDENCE,
            f"{nearest.name!r} is the nearest, but the first expert has {confidence:.0%} of the votes and the request "
            f"asks for {options.min_confidence:.0%}, so the base answers",
            confidence,
            votes,
        )
    return _matched(neighbours, electorate, ranking, rules, options, confidence, votes)


def _matched(
    neighbours: tuple[Neighbour, ...],
    electorate: list[Neighbour],
    ranking: Mapping[str, float],
    rules: Rules,
    options: RouteOptions,
    confidence: float,
    votes: dict[str, int],
) -> Decision:
    mode = options.mode or rules.mode
    candidates = dict(islice(ranking.items(), options.max_experts))
    weights = weigh(candidates, mode=mode, min_share=rules.min_share, steps=rules.steps)
    names: dict[str, str] = {}
    for voter in electorate:
        names.setdefault(voter.digest, voter.name)
    parts = tuple((names[digest], digest, weight) for digest, weight in weights.items())
    chosen = " and ".join(f"{name!r} ({weight:.0%})" if len(parts) > 1 else repr(name) for name, _, weight in parts)
    counted = ", ".join(f"{count} by {name!r}" for name, count in votes.items())
    nearest = next(neighbour for neighbour in neighbours if not neighbour.is_background)
    return Decision(
        Mix.of(weights),
        parts,
        Reason.MATCHED,
        f"the prompt is in the domain of {chosen}: {sum(votes.values())} of {len(neighbours)} nearest centres vote "
        f"({counted}), the nearest at distance {nearest.distance:.3g} of at most {nearest.reach:.3g}",
        nearest.distance,
        nearest.reach,
        confidence,
        neighbours,
        votes,
    )


def _nothing_but_background(neighbours: tuple[Neighbour, ...]) -> Decision:
    return Decision(
        BASE_MIX,
        (),
        Reason.OUT_OF_DOMAIN,
        f"the {len(neighbours)} centres nearest to the prompt are of general text and of no expert's exemplars, so the "
        f"base answers: the nearest is at distance {neighbours[0].distance:.3g}",
        neighbours[0].distance,
        None,
        0.0,
        neighbours,
    )


def _to_base(
    neighbours: tuple[Neighbour, ...],
    code: Reason,
    reason: str,
    confidence: float = 0.0,
    votes: dict[str, int] | None = None,
) -> Decision:
    nearest = next(neighbour for neighbour in neighbours if not neighbour.is_background)
    return Decision(BASE_MIX, (), code, reason, nearest.distance, nearest.reach, confidence, neighbours, votes or {})


def _most(confidence: float) -> str:
    return f"the first expert has only {confidence:.0%} of the votes"
