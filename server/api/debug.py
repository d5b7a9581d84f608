"""`/debug/engine`: what the engine is doing just now, for administrators."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from typing_extensions import TypedDict

from server.api.services import AnyServices
from store.access import OPERATOR

router = APIRouter(prefix="/debug")


class EngineView(TypedDict):
    """What runs, waits and is resident; its form may change. It holds no prompt and no answer."""

    object: Literal["engine"]
    stats: dict[str, Any]
    step_seconds: float | None
    """How long the present step has taken so far, where it takes too long to wait for its end: some figures may then be
    of before it and others not."""
    lanes: list[dict[str, Any]]
    weights: list[dict[str, float]]
    """The mixes that are merged into weights of their own, the one used last at the end."""
    native_steps: dict[str, int] | None
    """Steps that were one native call so far, on a CPU; null where they are not."""
    decode_graphs: dict[str, int] | None
    """CUDA graphs of decode steps that are kept, captures and replays so far; null where there are none."""
    experts: list[dict[str, Any]]
    waiting_for_experts: list[dict[str, Any]]
    names: dict[str, list[str]]
    """Digest → what experts are called."""
    base_sha256: str | None
    """Of the base's weights in memory, where it was asked for: it never changes."""


@router.get("/engine")
async def debug_engine(
    services: AnyServices,
    hash: Annotated[bool, Query(description="Hash the base's weights in memory too: takes seconds per GB.")] = False,
) -> EngineView:
    """Batch, mixes and tiers now: lanes with their sequences, experts on the device, and who waits for one."""
    seen = await services.engine.inspect()
    names: dict[str, list[str]] = {}
    for record in await services.library.list(OPERATOR):
        names.setdefault(record.digest, []).append(record.name)
    shown = {expert["digest"] for expert in seen["experts"]} | {part for lane in seen["lanes"] for part in lane["mix"]}
    return {
        "object": "engine",
        "stats": asdict(services.engine.stats()),
        "step_seconds": seen["step_seconds"],
        "lanes": seen["lanes"],
        "weights": seen["weights"],
        "native_steps": seen.get("native_steps"),
        "decode_graphs": seen.get("decode_graphs"),
        "experts": seen["experts"],
        "waiting_for_experts": seen["waiting_for_experts"],
        "names": {digest: called for digest, called in names.items() if digest in shown},
        "base_sha256": await services.engine.base_sha256() if hash else None,
    }
