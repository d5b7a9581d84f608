"""The choice between the modes, on invented costs; and that calibration measures what it says."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from server.engine.chooser import ModeChooser
from server.engine.costs import Costs, Curve, calibrate, units
from server.engine.executor import Executor
from server.engine.expert import DecodedExpert
from server.engine.kernels import backend
from server.engine.kernels.byte_lists import ABREAST, IN_BYTES
from server.engine.kernels.merging import merge_tensor
from server.engine.kernels.packing import gather_rows
from server.engine.kernels.reference import ReferenceKernels
from server.engine.kernels.types import BitPlanes, ByteLists, DenseValues, Overwrites, SparseRows
from server.engine.kv_cache import KVCache
from server.engine.layout import Layout
from server.engine.model import BaseModel
from server.engine.options import Mode
from server.engine.scheduler import Demand
from server.engine.synthetic import forms_of, synthetic_expert
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
    assert chooser(delta=0.3, patch=2.0).choose([Demand(A, 1, 100, 1)], EXPERTS, []) is Mode.MERGED
    assert chooser(delta=0.3, patch=2.0).choose([Demand(A, 1, 2, 1)], EXPERTS, []) is Mode.MIXED
    assert chooser(delta=0.3, patch=2.0).choose([Demand(A, 1, 2, 1)], EXPERTS, [A]) is Mode.MERGED, (
        "its weights lie ready"
    )


def test_a_prompt_is_read_once() -> None:
    """13 tokens beside the weights cost 3.9 s, the three steps after them 0.9: less than folding for 5."""
    assert chooser(delta=0.3, patch=5.0).choose([Demand(A, 13, 4, 1)], EXPERTS, []) is Mode.MIXED
    assert chooser(delta=0.3, patch=5.0).choose([Demand(A, 13, 4, 13)], EXPERTS, []) is Mode.MERGED


def test_mixes_share_steps_unless_their_deltas_cost_more_than_steps_of_their_own() -> None:
    both = [Demand(A, 1, 100, 1), Demand(B, 1, 100, 1)]
    assert chooser(delta=0.3, patch=0.0).choose(both, EXPERTS, [A]) is Mode.MIXED
    assert chooser(delta=3.0, patch=0.1).choose(both, EXPERTS, [A]) is Mode.MERGED
    assert chooser(delta=3.0, patch=300.0).choose(both, EXPERTS, [A]) is Mode.MIXED
    assert (
        chooser(delta=0.3, patch=0.0).choose([Demand(BASE_MIX, 1, 9, 1), Demand(A, 1, 9, 1)], EXPERTS, [A])
        is Mode.MIXED
    )


def test_mixes_that_are_all_kept_need_no_patch() -> None:
    both = [Demand(A, 1, 100, 1), Demand(B, 1, 100, 1)]
    assert chooser(delta=3.0, patch=300.0).choose(both, EXPERTS, [A, B], room=1) is Mode.MIXED, (
        "one displaces the other"
    )
    assert chooser(delta=3.0, patch=300.0).choose(both, EXPERTS, [A, B], room=2) is Mode.MERGED
    assert chooser(delta=3.0, patch=300.0).choose(both, EXPERTS, [A], room=2) is Mode.MIXED, "one must be built first"


def test_a_small_gain_is_not_worth_a_change() -> None:
    reluctant = chooser(delta=0.05, patch=0.0)
    lone = [Demand(A, 1, 100, 1)]
    assert reluctant.choose(lone, EXPERTS, [A]) is Mode.MIXED, "merged would save 5 %"
    assert reluctant.changes == 0
    willing = chooser(delta=0.3, patch=0.0)
    assert willing.choose(lone, EXPERTS, [A]) is Mode.MERGED
    assert willing.choose([Demand(BASE_MIX, 4, 100, 4)], EXPERTS, [A]) is Mode.MERGED, "the base alone decides nothing"
    assert willing.choose([Demand(A, 1, 100, 1), Demand(B, 1, 100, 1)], EXPERTS, [A]) is Mode.MIXED
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


def test_mixes_that_cannot_share_steps_decide_nothing() -> None:
    costs = Costs(
        step=Curve(((1, 1.0), (101, 2.0))), delta={DenseValues: Curve(((1, 0.003),))}, patch={DenseValues: 0.02}
    )
    own = ModeChooser(costs, 32, lambda mix, _: mix != A)
    assert own.choose([Demand(A, 1, 100, 1)], EXPERTS, []) is Mode.MIXED
    assert own.choose([Demand(BASE_MIX, 3, 100, 3), Demand(A, 1, 100, 1)], EXPERTS, []) is Mode.MIXED
    assert own.changes == 0, "it is merged by itself in either mode"
    assert own.choose([Demand(B, 1, 100, 1)], EXPERTS, [B]) is Mode.MERGED
    both = [Demand(A, 1, 2, 1), Demand(B, 1, 2, 1)]
    assert own.choose(both, EXPERTS, [B], room=2) is Mode.MERGED, "the patch of A is paid in either"


def test_deltas_cost_what_is_read_of_them() -> None:
    words, lists = torch.zeros(1, 3, 1, 2, 32, dtype=torch.int32), torch.zeros(7, dtype=torch.int16)
    order = torch.zeros(9, dtype=torch.int32)
    assert units(BitPlanes((8, 8), 1.0, words)) == 3 * 64, "every digit is read"
    assert units(SparseRows((8, 1000), 1.0, order[:8], order, lists, None)) == 7
    vectors = torch.zeros(3, 16, 4, dtype=torch.uint8)
    assert units(ByteLists((8, 1000), 1.0, vectors[0, :8, 0], order, vectors[:, 0, 0], vectors, None)) == 3 * 64
    assert units(DenseValues(torch.zeros(8, 8))) == 64


@pytest.mark.parametrize("shape", [(96, 70), (70, 96), (33, 40), (128, 5), (1, 64)])
@pytest.mark.parametrize("lanes", [1, ABREAST, IN_BYTES])
@pytest.mark.parametrize("apart", [0, 1 << 20])
def test_synthetic_experts_are_of_one_form_and_repeat_what_was_drawn(
    shape: tuple[int, int], lanes: int, apart: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.engine.synthetic._DRAWN", 32 * shape[1])
    monkeypatch.setattr("server.engine.synthetic._APART", apart)
    kernels = ReferenceKernels()
    monkeypatch.setattr(kernels, "lanes", lanes)
    for form in forms_of(kernels):
        expert = synthetic_expert(form, {"a": shape, "b": shape, "c": (3, 7)}, torch.device("cpu"), kernels)
        assert {type(delta) for delta in expert.tensors.values()} == {form}
        delta = expert.tensors["b"]
        assert (delta is expert.tensors["a"]) == (apart == 0), "as much as caches hold lies apart"
        matrix = torch.zeros(shape)
        merge_tensor(matrix, torch.zeros(shape), [(1.0, delta)])
        assert matrix.count_nonzero(), form
        assert not isinstance(delta, Overwrites)
        first = gather_rows(delta, torch.arange(shape[0]))
        assert torch.equal(first, matrix)
        if shape[0] % 32 == 0 or form is DenseValues:
            assert torch.equal(matrix, matrix[:32].repeat(-(-shape[0] // 32), 1)[: shape[0]])


def test_calibration_runs_steps_with_every_form(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    model = BaseModel(library.base, dtype=torch.float32, device=cpu, feature_layer=1, cache_dir=None)
    kernels = backend("reference", cpu)
    executor = Executor(model, KVCache(model.kv_shape, 1 << 20, cpu), kernels)
    seen: list[tuple[int, set[type]]] = []
    logits = executor.logits

    def watched(layout: Layout, experts: Mapping[str, DecodedExpert], *, mixed: bool) -> torch.Tensor:
        forms = {type(delta) for expert in experts.values() for delta in expert.tensors.values()}
        seen.append((len(layout.tokens), forms))
        return logits(layout, experts, mixed=mixed)

    monkeypatch.setattr(executor, "logits", watched)
    monkeypatch.setattr("server.engine.costs._STEP_SECONDS", 1e9)
    monkeypatch.setattr("server.engine.costs._DELTA_SECONDS", 1e9)
    costs = calibrate(model, executor, kernels, most_rows=20)
    assert {rows for rows, _ in seen} == {1, 8, 20}, "no step has more"
    assert {form for _, forms in seen for form in forms} == {BitPlanes, SparseRows, DenseValues}
    assert costs.delta.keys() == {BitPlanes, SparseRows, DenseValues}
    assert costs.patch.keys() == costs.delta.keys() | {Overwrites}
    assert costs.step(1) > 0
    assert costs.surcharge(EXPERTS["a"], 4) > 0
    assert costs.patching(EXPERTS["a"]) > 0
    assert executor.mixed_steps == executor.mixed.seconds == 0, "what was run to measure counts for nothing"
