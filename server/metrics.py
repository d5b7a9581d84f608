"""What `/metrics` shows. Each server has its own collector registry: two in one process never meet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.engine.types import EngineStats
from store.errors import StoreError
from store.record import ExpertRecord

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

EXPERT_LABELS = 100
"""Experts with a time series of their own; later ones share the label `other`."""

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0)
_DISTANCES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0, 3.0, 5.0)


class Metrics:
    """The server's counters and histograms, and a view of the engine's, read at each scrape."""

    def __init__(self, engine: Callable[[], EngineStats], experts: Callable[[], Sequence[ExpertRecord]]) -> None:
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
        self.router_distance = self._histogram(
            "switchyard_router_distance", "Distance from a routed prompt to the nearest centre.", _DISTANCES
        )
        self.router_fallbacks = Counter(
            "switchyard_router_fallbacks", "Routed prompts that went to the base.", registry=self.registry
        )
        self.mix_size = self._histogram(
            "switchyard_mix_experts", "Experts in the mix of an answer.", (0, 1, 2, 4, 8, 16)
        )
        self._expert_requests = Counter(
            "switchyard_expert_requests",
            f"Prompts answered by an expert; experts after the first {EXPERT_LABELS} count as `other`.",
            ["expert"],
            registry=self.registry,
        )
        self._labelled: set[str] = set()
        self.registry.register(_Snapshot(engine, experts))

    def count_expert(self, name: str) -> None:
        """Count one prompt that the expert takes part in answering."""
        if len(self._labelled) < EXPERT_LABELS:
            self._labelled.add(name)
        self._expert_requests.labels(name if name in self._labelled else "other").inc()

    def render(self) -> bytes:
        """The text that Prometheus scrapes. Reads the registry: call it from a thread."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, what: str, buckets: Iterable[float]) -> Histogram:
        return Histogram(name, what, buckets=tuple(buckets), registry=self.registry)


class _Snapshot(Collector):
    """What others keep count of, read once per scrape."""

    _GAUGES = (
        ("running", "switchyard_requests_running", "Sequences in the running batch."),
        ("waiting", "switchyard_requests_waiting", "Sequences that wait for room, a turn or an expert."),
        ("kv_bytes_used", "switchyard_kv_used_bytes", "Key/value cache in use."),
        ("kv_bytes_total", "switchyard_kv_limit_bytes", "Key/value cache."),
        ("resident_experts", "switchyard_experts_resident", "Experts decoded on the device."),
        (
            "mode_is_mixed",
            "switchyard_mode_mixed",
            "1 while mixed mode is chosen for batches with experts, 0 for merged.",
        ),
        ("resident_bytes_limit", "switchyard_experts_resident_limit_bytes", "Memory allowed for decoded experts."),
    )
    _COUNTERS = (
        ("expert_loads", "switchyard_expert_loads", "Experts read and decoded."),
        ("expert_evictions", "switchyard_expert_evictions", "Decoded experts dropped to make room."),
        ("expert_load_seconds", "switchyard_expert_load_seconds", "Time spent reading and decoding experts."),
        ("mix_switches", "switchyard_mix_switches", "Times the model was pointed at another mix's weights."),
        ("patches", "switchyard_patches", "Times the weights of a mix were built."),
        ("patch_seconds", "switchyard_patch_seconds", "Time spent building the weights of mixes."),
        ("merged_steps", "switchyard_merged_steps", "Steps that ran with a mix merged into the weights."),
        ("mixed_steps", "switchyard_mixed_steps", "Steps that applied deltas beside the weights."),
        ("mixed_seconds", "switchyard_mixed_surcharge_seconds", "Time spent on deltas beside the weights."),
        ("mode_changes", "switchyard_mode_changes", "Times that `auto` changed between merged and mixed mode."),
        ("prompt_tokens", "switchyard_prompt_tokens", "Prompt tokens computed."),
        ("generated_tokens", "switchyard_generated_tokens", "Tokens generated."),
        ("preemptions", "switchyard_preemptions", "Sequences put back to free their cache."),
        ("steps", "switchyard_engine_steps", "Steps of the engine."),
    )

    def __init__(self, engine: Callable[[], EngineStats], experts: Callable[[], Sequence[ExpertRecord]]) -> None:
        self._engine = engine
        self._experts = experts

    def collect(self) -> Iterator[Metric]:
        stats = self._engine()
        for field, name, what in self._GAUGES:
            yield GaugeMetricFamily(name, what, value=getattr(stats, field))
        for field, name, what in self._COUNTERS:
            yield CounterMetricFamily(name, what, value=getattr(stats, field))
        tiers = GaugeMetricFamily(
            "switchyard_expert_tier_bytes", "Bytes of experts, by where they are.", labels=["tier"]
        )
        tiers.add_metric(["device"], stats.resident_bytes)
        try:
            experts = self._experts()
        except StoreError:  # the store's trouble must not hide the engine's figures
            experts = None
        if experts is not None:
            tiers.add_metric(["disk"], sum({record.digest: record.bytes for record in experts}.values()))
            yield GaugeMetricFamily("switchyard_experts", "Experts in the registry.", value=len(experts))
        yield tiers

    def describe(self) -> Iterator[Metric]:
        # Without it the registry would collect when this registers, before the engine has started.
        return iter(())
