"""What `/metrics` shows. Each server has its own collector registry: two in one process never meet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.engine.stats import EngineStats
from server.engine.timing import Timing
from server.expert_labels import ExpertLabels, drop
from server.routing_metrics import RoutingMetrics
from store.errors import StoreError
from store.record import ExpertRecord
from store.tiers import Tier, TierStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

EXPERT_LABELS = 100
"""Experts with a time series of their own; all others share the label `other`. A series never falls: an expert that
gets one begins at 0, and what was counted under `other` stays there."""
EXPERT_IDLE_SECONDS = 3600.0
"""An expert that nobody has used for so long gives its series up to another one."""

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0)


class Metrics:
    """The server's counters and histograms, and a view of the engine's, read at each scrape."""

    def __init__(
        self,
        engine: Callable[[], EngineStats],
        experts: Callable[[], Sequence[ExpertRecord]],
        stored: Callable[[], Sequence[TierStats]] = tuple,
    ) -> None:
        """Args:
        experts: all experts.
        stored: what the tiers of the store have done.
        """
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "switchyard_requests", "HTTP requests by route and status.", ["route", "status"], registry=self.registry
        )
        self.failures = Counter(
            "switchyard_failures", "Failed requests by error code.", ["code"], registry=self.registry
        )
        self.time_to_first_token = self._histogram(
            "switchyard_time_to_first_token_seconds", "From the request to the first token of an answer.", _SECONDS
        )
        self.inter_token = self._histogram(
            "switchyard_inter_token_seconds", "From one token of an answer to the next.", _TOKEN_SECONDS
        )
        self.end_to_end = self._histogram(
            "switchyard_request_duration_seconds", "From the request to the last token of an answer.", _SECONDS
        )
        self.load_wait = self._histogram(
            "switchyard_expert_wait_seconds",
            "From a request's way into the engine until its experts are there.",
            _SECONDS,
        )
        self.queue_wait = self._histogram(
            "switchyard_queue_seconds", "From then until its first step begins.", _SECONDS
        )
        self.prefill = self._histogram(
            "switchyard_prefill_seconds", "From its first step to its first token, the patch included.", _SECONDS
        )
        self.mix_size = self._histogram(
            "switchyard_mix_experts", "Experts in the mix of an answer.", (0, 1, 2, 4, 8, 16)
        )
        self._expert_requests = Counter(
            "switchyard_expert_requests",
            f"Prompts answered by an expert; those beyond {EXPERT_LABELS} in use within the hour count as `other`.",
            ["expert"],
            registry=self.registry,
        )
        self._labels = ExpertLabels(EXPERT_LABELS, EXPERT_IDLE_SECONDS, self._forget)
        self.routing = RoutingMetrics(self.registry, self._labels.of)
        self.body_bytes = Gauge("switchyard_body_bytes", "Memory of requests' bodies.", registry=self.registry)
        self.body_limit_bytes = Gauge(
            "switchyard_body_limit_bytes", "Most memory of requests' bodies.", registry=self.registry
        )
        self.registry.register(_Snapshot(engine, experts, stored))

    def count_expert(self, name: str) -> None:
        """Count one prompt that the expert takes part in answering."""
        self._expert_requests.labels(self._labels.of(name)).inc()

    def time_inside(self, timing: Timing) -> None:
        """Note how an answer came to its first token."""
        self.load_wait.observe(timing.granted - timing.arrived)
        self.queue_wait.observe(timing.scheduled - timing.granted)
        self.prefill.observe(timing.answered - timing.scheduled)

    def render(self) -> bytes:
        """The text that Prometheus scrapes. Reads the registry: call it from a thread."""
        return generate_latest(self.registry)

    def _forget(self, label: str) -> None:
        drop(self._expert_requests, label)
        self.routing.forget(label)

    def _histogram(self, name: str, what: str, buckets: Iterable[float]) -> Histogram:
        return Histogram(name, what, buckets=tuple(buckets), registry=self.registry)


class _Snapshot(Collector):
    """What others keep count of, read once per scrape."""

    _GAUGES = (
        ("running", "switchyard_requests_running", "Sequences in the running batch."),
        ("waiting", "switchyard_requests_waiting", "Sequences that wait for room, a turn or an expert."),
        ("kv_bytes_used", "switchyard_kv_used_bytes", "Key/value cache in use."),
        ("kv_bytes_kept", "switchyard_kv_kept_bytes", "Unused key/value cache that prompts may still find."),
        ("kv_bytes_total", "switchyard_kv_limit_bytes", "Key/value cache."),
        (
            "mode_is_mixed",
            "switchyard_mode_mixed",
            "1 while mixed mode is chosen for batches with experts, 0 for merged.",
        ),
    )
    _COUNTERS = (
        ("mix_switches", "switchyard_mix_switches", "Times the model was pointed at another mix's weights."),
        ("patches", "switchyard_patches", "Times the weights of a mix were built."),
        ("patch_seconds", "switchyard_patch_seconds", "Time spent building the weights of mixes."),
        ("merged_steps", "switchyard_merged_steps", "Steps that ran with a mix merged into the weights."),
        ("mixed_steps", "switchyard_mixed_steps", "Steps that applied deltas beside the weights."),
        ("mixed_seconds", "switchyard_mixed_surcharge_seconds", "Time spent on deltas beside the weights."),
        ("mode_changes", "switchyard_mode_changes", "Times that `auto` changed between merged and mixed mode."),
        ("prompt_tokens", "switchyard_prompt_tokens", "Prompt tokens computed."),
        ("cached_tokens", "switchyard_prompt_cached_tokens", "Prompt tokens found in the cache instead of computed."),
        ("generated_tokens", "switchyard_generated_tokens", "Tokens generated."),
        ("preemptions", "switchyard_preemptions", "Sequences put back to free their cache."),
        ("steps", "switchyard_engine_steps", "Steps of the engine."),
    )

    def __init__(
        self,
        engine: Callable[[], EngineStats],
        experts: Callable[[], Sequence[ExpertRecord]],
        stored: Callable[[], Sequence[TierStats]],
    ) -> None:
        self._engine = engine
        self._experts = experts
        self._stored = stored

    def collect(self) -> Iterator[Metric]:
        stats = self._engine()
        for field, name, what in self._GAUGES:
            yield GaugeMetricFamily(name, what, value=getattr(stats, field))
        for field, name, what in self._COUNTERS:
            yield CounterMetricFamily(name, what, value=getattr(stats, field))
        stored: list[TierStats] = []
        try:
            experts = self._experts()
        except StoreError:  # the store's trouble must not hide the engine's figures
            stored += self._stored()
        else:
            size = sum({record.digest: record.bytes for record in experts}.values())
            yield GaugeMetricFamily("switchyard_experts", "Experts in the registry.", value=len(experts))
            for tier in self._stored():
                known = tier.tier is Tier.STORE
                stored.append(replace(tier, used_bytes=size, experts=len(experts)) if known else tier)
        yield from _tier_families([*stats.tiers, *stored])

    def describe(self) -> Iterator[Metric]:
        # Without it the registry would collect when this registers, before the engine has started.
        return iter(())


_TIER_GAUGES = (
    ("used_bytes", "bytes", "Bytes of experts, by where they are."),
    ("limit_bytes", "limit_bytes", "Most bytes of experts, by where they are."),
    ("experts", "experts", "Experts, by where they are."),
)
_TIER_COUNTERS = (
    ("hits", "hits", "Look-ups that found an expert in a tier."),
    ("misses", "misses", "Look-ups that did not find an expert in a tier."),
    ("loads", "loads", "Experts put into a tier; of the store: read from it."),
    ("evictions", "evictions", "Experts dropped from a tier to make room."),
    ("load_seconds", "load_seconds", "Time spent on putting experts into a tier."),
    ("faults", "faults", "Damaged copies found in a tier; none was used."),
    ("healed", "healed", "Damaged copies in a tier that were made anew from another one."),
)


def _tier_families(tiers: Sequence[TierStats]) -> Iterator[Metric]:
    for field, name, what in _TIER_GAUGES:
        gauge = GaugeMetricFamily(f"switchyard_expert_tier_{name}", what, labels=["tier"])
        for tier in tiers:
            if (value := getattr(tier, field)) is not None:
                gauge.add_metric([tier.tier], value)
        yield gauge
    for field, name, what in _TIER_COUNTERS:
        counter = CounterMetricFamily(f"switchyard_expert_tier_{name}", what, labels=["tier"])
        for tier in tiers:
            counter.add_metric([tier.tier], getattr(tier, field))
        yield counter
