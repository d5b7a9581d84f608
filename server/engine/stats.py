"""What the engine has been doing: counts for `/metrics` and `/ready`. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass

from store.tiers import Tier, TierStats


@dataclass(frozen=True)
class EngineStats:
    """A snapshot for `/metrics` and `/ready`."""

    running: int
    waiting: int
    kv_bytes_used: int
    kv_bytes_kept: int
    """Unused, but what they hold may be found again."""
    kv_bytes_total: int
    mix_switches: int
    patches: int
    patch_seconds: float
    merged_steps: int
    mixed_steps: int
    mixed_seconds: float
    mode_changes: int
    mode_is_mixed: int
    """1 or 0."""
    prompt_tokens: int
    """Computed; those found in the cache are `cached_tokens`."""
    cached_tokens: int
    generated_tokens: int
    preemptions: int
    steps: int
    tiers: tuple[TierStats, ...] = ()
    """Experts on the device and in host memory."""

    def tier(self, tier: Tier) -> TierStats:
        """What one of the engine's tiers has done."""
        return next((stats for stats in self.tiers if stats.tier is tier), TierStats(tier))
