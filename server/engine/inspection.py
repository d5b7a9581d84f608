"""What the engine is doing, for `/debug/engine`. Read on the engine's thread between two steps, or beside it in one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from server.engine.executor import Executor
from server.engine.graphs import DecodeGraphs
from server.engine.native_steps import NativeSteps
from server.engine.residency import Residency
from server.engine.scheduler import Lane, Scheduler
from server.engine.sequence import Sequence
from store.mix import Mix

View = TypeVar("View")

_SHOWN = 100
"""Sequences of a lane, of either kind: a page is for people."""


def beside(look: Callable[[], View]) -> View:
    """Look from another thread: whatever changes hands while it is being read is read again."""
    while True:
        try:
            return look()
        except RuntimeError:
            continue


def view(
    scheduler: Scheduler, residency: Residency, executor: Executor, busy_since: float | None = None
) -> dict[str, Any]:
    """Lanes with their sequences, experts on the device, and what the weights are. No tokens, no text.

    Args:
        busy_since: when the step in progress began, by `time.monotonic`; None between two steps.

    Raises:
        RuntimeError: what is read was changed meanwhile, which cannot be on the engine's thread.
    """
    now = time.monotonic()
    return {
        "step_seconds": None if busy_since is None else round(now - busy_since, 3),
        "lanes": [_lane(lane, now) for lane in scheduler.lanes],
        "weights": [_mix(mix) for mix in executor.merged.built],
        "native_steps": executor.fast.counts() if isinstance(executor.fast, NativeSteps) else None,
        "decode_graphs": executor.fast.counts() if isinstance(executor.fast, DecodeGraphs) else None,
        "experts": [
            {"digest": digest, "bytes": size, "used_by": pins, "decoded": decoded}
            for digest, (size, pins, decoded) in residency.pins().items()
        ],
        "waiting_for_experts": [
            {"mix": _mix(mix), "seconds": round(seconds, 3)} for mix, seconds in residency.waiting().items()
        ],
    }


def _lane(lane: Lane, now: float) -> dict[str, Any]:
    return {
        "mix": _mix(lane.mix),
        "running": len(lane.running),
        "waiting": len(lane.waiting),
        "sequences": [_sequence(one, now) for one in [*lane.running[:_SHOWN], *list(lane.waiting)[:_SHOWN]]],
    }


def _sequence(sequence: Sequence, now: float) -> dict[str, Any]:
    return {
        "id": sequence.id,
        "state": sequence.state.value,
        "prompt_tokens": len(sequence.request.prompt),
        "output_tokens": sequence.output_length,
        "max_tokens": sequence.max_tokens,
        "computed": sequence.computed,
        "blocks": len(sequence.blocks),
        "age_seconds": round(now - sequence.arrived, 3),
    }


def _mix(mix: Mix) -> dict[str, float]:
    return dict(mix.parts)
