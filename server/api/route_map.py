"""`GET /v1/route/map`: where experts and the prompts routed last lie, and why each went where it did."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query
from typing_extensions import TypedDict

from router.map import Points
from server.api.answer import MixPart
from server.api.route import Neighbour, neighbours_of, parts_of
from server.api.route_report import MOST, Point, points_of
from server.api.services import Asker, ReadyServices
from server.route_reports import Routed

router = APIRouter()


class MappedExpert(TypedDict):
    """An expert on the map."""

    id: str
    digest: str
    centres: list[Point]


class RoutedPrompt(TypedDict):
    """A prompt that was routed lately, without its text, and the decision as `POST /v1/route` tells it."""

    number: int
    at: float
    x: float
    y: float
    mix: list[MixPart]
    code: str
    reason: str
    distance: float | None
    threshold: float | None
    confidence: float | None
    neighbours: list[Neighbour]


class RouteMap(TypedDict):
    """Centres in two dimensions. Places of one `edition` can be laid upon each other; those of another cannot."""

    object: Literal["route.map"]
    edition: str
    axes: list[float]
    """Shares of the centres' spread that the two axes show."""
    experts: list[MappedExpert]
    left_out: int
    background: list[Point]
    recent: list[RoutedPrompt]
    """The oldest first."""


@router.get("/v1/route/map")
async def route_map(
    services: ReadyServices,
    asker: Asker,
    experts: Annotated[int, Query(ge=1, le=MOST)] = 24,
    after: Annotated[int, Query(ge=0, le=2**53, description="Only prompts with a number above.")] = 0,
) -> RouteMap:
    """A map of experts that the caller may use, and the prompts its tenant had routed last; cheap enough to follow."""
    live = await services.reports.map(experts, asker, after=after)
    return {
        "object": "route.map",
        "edition": live.map.projection.edition,
        "axes": [round(share, 4) for share in live.map.projection.spread],
        "experts": [
            {"id": place.name, "digest": place.digest, "centres": points_of(place.centres)} for place in live.map.places
        ],
        "left_out": live.map.left_out,
        "background": points_of(live.map.background),
        "recent": _prompts(live.routed, live.places),
    }


def _prompts(routed: tuple[Routed, ...], places: Points) -> list[RoutedPrompt]:
    return [_prompt(one, x, y) for one, (x, y) in zip(routed, points_of(places), strict=True)]


def _prompt(one: Routed, x: float, y: float) -> RoutedPrompt:
    decision = one.decision
    return {
        "number": one.number,
        "at": round(one.at, 3),
        "x": x,
        "y": y,
        "mix": parts_of(decision),
        "code": decision.code,
        "reason": decision.reason,
        "distance": decision.distance,
        "threshold": decision.threshold,
        "confidence": decision.confidence,
        "neighbours": neighbours_of(decision),
    }
