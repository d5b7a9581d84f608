"""What `/metrics` shows of routing: decisions, how sure they were, drift, and what clients would have got."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from router.decision import Decision, Reason
from server.expert_labels import drop

_DISTANCES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0, 3.0, 5.0)
_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)

REMEMBERED = 50
"""Prompts of an expert over which drift is averaged: an older one counts less and less."""


class Outcome(StrEnum):
    """What routing would have done with a request that named its expert."""

    AGREE = "agree"
    OTHER = "other"
    """Another expert would have answered."""
    BASE = "base"


class RoutingMetrics:
    """Counters and averages of routing. For one event loop.

    Args:
        label: the label of an expert's name: only so many have one of their own.
    """

    def __init__(self, registry: CollectorRegistry, label: Callable[[str], str]) -> None:
        self._label = label
        self._distance = Histogram(
            "switchyard_router_distance",
            "Distance from a routed prompt to the nearest centre.",
            buckets=_DISTANCES,
            registry=registry,
        )
        self._confidence = Histogram(
            "switchyard_router_confidence",
            "Share of the votes that the first expert had for a routed prompt, those of general text included.",
            buckets=_SHARES,
            registry=registry,
        )
        self._fallbacks = Counter(
            "switchyard_router_fallbacks", "Routed prompts that went to the base.", registry=registry
        )
        self._decisions = Counter(
            "switchyard_router_decisions", "Routed prompts by the code of the decision.", ["code"], registry=registry
        )
        self._chosen = Counter(
            "switchyard_router_chosen", "Routed prompts by an expert that they went to.", ["expert"], registry=registry
        )
        self._drift = Gauge(
            "switchyard_router_drift",
            f"How far the last {REMEMBERED} or so prompts routed to an expert lie from its exemplars, on average; at 1 "
            "its domain ends.",
            ["expert"],
            registry=registry,
        )
        self._shadow = Counter(
            "switchyard_router_shadow",
            "Sampled requests that named an expert, by what routing would have done: agree, other or base.",
            ["expert", "outcome"],
            registry=registry,
        )
        for code in Reason:  # shown from the beginning: a rate over a series that has just appeared is nothing
            self._decisions.labels(code)
        self._averages: dict[str, tuple[int, float]] = {}

    def decided(self, decision: Decision) -> None:
        """Count what was decided for a routed prompt."""
        self._decisions.labels(decision.code).inc()
        if decision.distance is not None:
            self._distance.observe(decision.distance)
        if decision.confidence is not None:
            self._confidence.observe(decision.confidence)
        if decision.mix.is_base:
            self._fallbacks.inc()
        for name, digest, _ in decision.parts:
            label = self._label(name)
            self._chosen.labels(label).inc()
            if decision.code is Reason.MATCHED:  # what only follows on from earlier turns is near nothing by itself
                self._drifts(label, decision, digest)

    def shadowed(self, name: str, digest: str, decision: Decision) -> None:
        """Count what routing would have done with a prompt whose request named that expert."""
        if decision.mix.is_base:
            outcome = Outcome.BASE
        else:
            outcome = Outcome.AGREE if decision.parts[0][1] == digest else Outcome.OTHER
        self._shadow.labels(self._label(name), outcome).inc()

    def forget(self, label: str) -> None:
        """Remove the series of a label that is given up."""
        for metric in (self._chosen, self._drift):
            drop(metric, label)
        for outcome in Outcome:
            drop(self._shadow, label, outcome)
        self._averages.pop(label, None)

    def _drifts(self, label: str, decision: Decision, digest: str) -> None:
        nearest = next((one for one in decision.neighbours if one.digest == digest), None)
        if nearest is None:
            return
        count, average = self._averages.get(label, (0, 0.0))
        count = min(count + 1, REMEMBERED)  # the first ones are averaged plainly: one odd prompt is no drift
        average += (nearest.distance / nearest.reach - average) / count
        self._averages[label] = count, average
        self._drift.labels(label).set(average)
