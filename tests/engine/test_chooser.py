"""The choice between the modes, on invented costs; and that calibration measures what it says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from server.engine.chooser import ModeChooser
from server.engine.costs import Costs, Curve, calibrate
from server.engine.expert import DecodedExpert
from server.engine.kernels import backend
from server.engine.kernels.types import BitPlanes, DenseValues, Overwrites, SparseRows
from server.engine.model import BaseModel
from server.engine.options import Mode
from server.engine.scheduler import Demand
from store.mix import BASE_MIX, Mix
from tests.engine.conftest import Library

A, B = Mix.of({"a": 1.0}), Mix.of({"b": 1.0})
EXPERTS = {digest: DecodedExpert(digest, {"w": DenseValues(torch.zeros(10, 10))}) for digest in "ab"}


def chooser(delta: float, patch: float, turn_steps: int = 32) -> ModeChooser:
    """A step costs 1 s and 0.01 s more per row; an expert, so much per row beside the weights, or once merged."""
    costs = Costs(
        step=Curve(((1, 1.0), (101, 2.0))),
        delta={DenseValues: Curve(((1, delta / 100), (2, delta / 50)))},
        patch={DenseValues: patch / 100},
    )
    return ModeChooser(costs, turn_steps)


def test_a_lone_mix_with_long_answers_is_merged_and_with_short_ones_is_not() -> None:
    assert chooser(delta=0.3, patch=2.0).choose([Demand(A, 1, 100)], EXPERTS, []) is Mode.MERGED
    assert chooser(delta=0.3, patch=2.0).choose([Demand(A, 1, 2)], EXPERTS, []) is Mode.MIXED
    assert chooser(delta=0.3, patch=2.0).choose([Demand(A, 1, 2)], EXPERTS, [A]) is Mode.MERGED, "its weights lie ready"


def test_mixes_share_steps_unless_their_deltas_cost_more_than_steps_of_their_own() -> None:
    both = [Demand(A, 1, 100), Demand(B, 1, 100)]
    assert chooser(delta=0.3, patch=0.0).choose(both, EXPERTS, [A]) is Mode.MIXED
    assert chooser(delta=3.0, patch=0.1).choose(both, EXPERTS, [A]) is Mode.MERGED
    assert chooser(delta=3.0, patch=300.0).choose(both, EXPERTS, [A]) is Mode.MIXED
    assert chooser(delta=0.3, patch=0.0).choose([Demand(BASE_MIX, 1, 9), Demand(A, 1, 9)], EXPERTS, [A]) is Mode.MIXED


def test_mixes_that_are_all_kept_need_no_patch() -> None:
    both = [Demand(A, 1, 100), Demand(B, 1, 100)]
    assert chooser(delta=3.0, patch=300.0).choose(both, EXPERTS, [A, B], room=1) is Mode.MIXED, (
        "one displaces the other"
    )
    assert chooser(delta=3.0, patch=300.0).choose(both, EXPERTS, [A, B], room=2) is Mode.MERGED
    assert chooser(delta=3.0, patch=300.0).choose(both, EXPERTS, [A], room=2) is Mode.MIXED, "one must be built first"


def test_a_small_gain_is_not_worth_a_change() -> None:
    reluctant = chooser(delta=0.05, patch=0.0)
    lone = [Demand(A, 1, 100)]
    assert reluctant.choose(lone, EXPERTS, [A]) is Mode.MIXED, "merged would save 5 %"
    assert reluctant.changes == 0
    willing = chooser(delta=0.3, patch=0.0)
    assert willing.choose(lone, EXPERTS, [A]) is Mode.MERGED
    assert willing.choose([Demand(BASE_MIX, 4, 100)], EXPERTS, [A]) is Mode.MERGED, "the base alone decides nothing"
    assert willing.choose([Demand(A, 1, 100), Demand(B, 1, 100)], EXPERTS, [A]) is Mode.MIXED
    assert willing.changes == 2


@given(
    st.lists(st.tuples(st.integers(1, 100), st.floats(0, 10)), min_size=1, max_size=5, unique_by=lambda p: p[0]),
    st.integers(1, 300),
    st.integers(0, 300),
)
def test_curves_pass_through_their_points_and_never_fall_between_rising_ones(
    points: list[tuple[int, float]], rows: int, more: int
) -> None:
    rising = [(at, seconds) for (at, _), seconds in zip(sorted(points), sorted(s for _, s in points), strict=True)]
    curve = Curve(tuple(rising))
    assert all(curve(at) == pytest.approx(seconds) for at, seconds in rising)
    assert curve(rows) <= curve(rows + more) + 1e-9


def test_calibration_prices_every_form(library: Library) -> None:
    cpu = torch.device("cpu")
    model = BaseModel(library.base, dtype=torch.float32, device=cpu, feature_layer=1, cache_dir=None)
    costs = calibrate(model, backend("reference", cpu))
    assert costs.delta.keys() == costs.patch.keys() == {BitPlanes, SparseRows, DenseValues, Overwrites}
    assert costs.step(1) > 0
    assert costs.surcharge(EXPERTS["a"], 4) > 0
    assert costs.patching(EXPERTS["a"]) > 0
