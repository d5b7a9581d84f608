"""What plans foresee, against the engine's own tiers: one short trace of each kind."""

from __future__ import annotations

import pytest

from bench.plan import Case, foreseen, replay


@pytest.mark.parametrize(
    "case",
    [Case(40, 1.0, 8, host=12), Case(40, 1.0, 8, host=20, apart=True), Case(40, 0.8, 6, replicas=2)],
    ids=["one memory", "two memories", "replicas"],
)
def test_hit_rates_are_as_foreseen(case: Case) -> None:
    """A short trace wavers; what a plan got wrong would be farther off."""
    measured, planned = replay(case, requests=1600, seed=3), foreseen(case)
    assert measured == pytest.approx(planned, abs=0.06)
    assert all(share > 0.1 for share, there in zip(measured, (True, bool(case.host)), strict=True) if there)
