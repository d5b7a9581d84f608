"""`GET /v1/route/report`: how well experts are told apart, as numbers and as a map."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from typing_extensions import TypedDict

from router.map import Points
from router.report import EXEMPLARS, Report
from server.api.services import Asker, ReadyServices
from server.api.streaming import until_disconnect

router = APIRouter()

MOST = 64
METHOD = (
    "every fifth exemplar of an expert is held out in all its forms, the router is fitted without them, and up to "
    f"{EXEMPLARS} forms of them are routed; of an expert with fewer than five, each is left out of its centre only"
)

Point = list[float]


class ReportedExpert(TypedDict):
    """One expert of a report."""

    id: str
    digest: str
    recent_requests: int
    centres: list[Point]
    held_out: bool
    """Whether the exemplars routed were held out of all that was fitted, or each was left out of its centre only."""
    routed_to: list[int]
    """How many of its own exemplars would go to each of the experts, in the order of the report."""
    routed_to_others: int
    routed_to_base: int


class RecentRequest(TypedDict):
    """Where a prompt that was routed lately lies; `id` is null where the base answered, or an expert not shown."""

    x: float
    y: float
    id: str | None


class RouteReport(TypedDict):
    """Experts against each other: a confusion matrix, row by row, and a map."""

    object: Literal["route.report"]
    method: str
    experts: list[ReportedExpert]
    left_out: int
    axes: list[float]
    """Shares of the centres' spread that the two axes of the map show."""
    background: list[Point]
    recent: list[RecentRequest]


@router.get("/v1/route/report")
async def route_report(
    request: Request, services: ReadyServices, asker: Asker, experts: Annotated[int, Query(ge=1, le=MOST)] = 24
) -> RouteReport:
    """A confusion matrix and a map, of experts that the caller may use: those asked for lately, then an even choice."""
    return _answer(await until_disconnect(request.receive, services.reports.make(experts, asker)))


def _answer(report: Report) -> RouteReport:
    return {
        "object": "route.report",
        "method": METHOD,
        "experts": [
            {
                "id": row.name,
                "digest": row.digest,
                "recent_requests": row.requests,
                "centres": points_of(row.centres),
                "held_out": row.is_held_out,
                "routed_to": list(row.counts[:-2]),
                "routed_to_others": row.counts[-2],
                "routed_to_base": row.counts[-1],
            }
            for row in report.rows
        ],
        "left_out": report.left_out,
        "axes": [round(share, 4) for share in report.spread],
        "background": points_of(report.background),
        "recent": [
            {"x": x, "y": y, "id": name} for (x, y), name in zip(points_of(report.seen), report.seen_names, strict=True)
        ],
    }


def points_of(points: Points) -> list[Point]:
    """Places on the map, rounded to what a screen can show."""
    rounded: list[Point] = points.round(4).tolist()
    return rounded
