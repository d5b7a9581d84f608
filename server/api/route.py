"""`POST /v1/route`: which experts would answer, and why, without answering."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from typing_extensions import TypedDict

from router.decision import Decision
from server.api.answer import MixPart
from server.api.schema import RouteBody
from server.api.services import Asker, ReadyServices

router = APIRouter()


class Neighbour(TypedDict):
    """A centre near the prompt: of an expert's exemplars, or, without id and digest, of general text."""

    id: str | None
    digest: str | None
    distance: float
    threshold: float | None
    exemplar: str


class RouteDecision(TypedDict):
    """The mix for a prompt, empty for the base, and what led to it."""

    object: Literal["route"]
    mix: list[MixPart]
    reason: str
    code: str
    distance: float | None
    threshold: float | None
    confidence: float | None
    neighbours: list[Neighbour]
    votes: dict[str, float]


@router.post("/v1/route")
async def route(body: RouteBody, services: ReadyServices, asker: Asker) -> RouteDecision:
    """Route a prompt, or the last user message of a conversation."""
    decision = await services.generation.decide(body.to_prompt(), body.to_options(), asker)
    return {
        "object": "route",
        "mix": parts_of(decision),
        "reason": decision.reason,
        "code": decision.code,
        "distance": decision.distance,
        "threshold": decision.threshold,
        "confidence": decision.confidence,
        "neighbours": neighbours_of(decision),
        "votes": dict(decision.votes),
    }


def parts_of(decision: Decision) -> list[MixPart]:
    """Who was chosen."""
    return [{"id": name, "digest": digest, "weight": weight} for name, digest, weight in decision.parts]


def neighbours_of(decision: Decision) -> list[Neighbour]:
    """The centres that led to a decision, nearest first."""
    return [
        {
            "id": None if n.is_background else n.name,
            "digest": None if n.is_background else n.digest,
            "distance": n.distance,
            "threshold": None if n.is_background else n.reach,
            "exemplar": n.exemplar,
        }
        for n in decision.neighbours
    ]
