"""Tables of all matrices at once, which must say what those made one by one say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.kernels import Group, PackedDelta, pack
from server.engine.kernels.gpu_batches import BatchTables, Part, expert_rows
from server.engine.kernels.gpu_tables import Launch
from server.engine.kernels.types import BitPlanes, SparseRows
from store.deltas import DenseDelta
from tests.engine.kernels import plain_tables
from tests.engine.kernels.builders import sparse_delta

SHAPE = (40, 50)
CPU = torch.device("cpu")
kinds = st.sampled_from(["planes", "planes", "planes", "digits", "lists", "lists", "levels", "dense", None, None])
numbers = st.one_of(st.just(1.0), st.floats(-3, 3), st.sampled_from([1e-46, 3e38, 1e200]))


def delta_of(kind: str | None, scale: float) -> PackedDelta | None:
    """In memory of its own."""
    if kind is None:
        return None
    if kind == "dense":
        return pack(DenseDelta(np.ones(SHAPE, np.float32)), CPU)
    density, top = {"planes": (0.5, 1), "digits": (0.9, 9), "lists": (0.02, 1), "levels": (0.02, 3)}[kind]
    made = pack(sparse_delta(0, SHAPE, density, top=top), CPU)
    assert isinstance(made, BitPlanes if kind in ("planes", "digits") else SparseRows)
    return replace(made, scale=scale)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[list[PackedDelta | None]], list[Part]]:
    """Experts' deltas of a few matrices, often alike, and rows with weights of experts."""
    experts = draw(st.integers(0, 5))
    usual = draw(st.lists(kinds, min_size=experts, max_size=experts))
    matrices = draw(st.integers(1, 5))
    found = [
        [delta_of(draw(kinds) if draw(st.integers(0, 3)) == 0 else kind, draw(numbers)) for _ in range(matrices)]
        for kind in usual
    ]
    parts: list[Part] = []
    row = 0
    for _ in range(draw(st.integers(1, 6))):
        start = row + draw(st.integers(0, 2))
        row = start + draw(st.one_of(st.integers(1, 6), st.integers(7, 80)))
        chosen = draw(st.lists(st.integers(0, experts - 1), unique=True, max_size=3)) if experts else []
        parts.append((start, row, tuple((draw(numbers), expert) for expert in chosen)))
    return found, parts


@settings(max_examples=150, deadline=None)
@given(batch=batches(), padded=st.booleans(), data=st.data())
def test_tables_made_at_once_equal_those_made_one_by_one(
    batch: tuple[list[list[PackedDelta | None]], list[Part]], padded: bool, data: st.DataObject
) -> None:
    experts, parts = batch
    count = len(experts[0]) if experts else 2
    chosen = data.draw(st.lists(st.integers(0, count - 1), unique=True).map(sorted))
    made = BatchTables([expert_rows(own) for own in experts], parts, np.array(chosen, np.int64), padded=padded)
    tables = np.full(made.size, -1, np.int64)
    made.fill(tables)
    found = made.launches(torch.from_numpy(tables))
    assert len(found) == len(chosen)
    expected = [by_itself(experts, parts, matrix, padded) for matrix in chosen]
    for own, plain in zip(found, expected, strict=True):
        assert (own is None) == (plain is None)
        for mine, other in zip(own or (), plain or (), strict=True):
            assert form(mine) == form(other)
            assert mine.table.tolist() == other.table.tolist()
    assert made.complete == (None not in expected)


def by_itself(
    experts: list[list[PackedDelta | None]], parts: list[Part], matrix: int, padded: bool
) -> tuple[Launch, ...] | None:
    groups = []
    for start, stop, weights in parts:
        deltas = ((weight, experts[expert][matrix]) for weight, expert in weights)
        groups.append(Group(start, stop, tuple((weight, delta) for weight, delta in deltas if delta is not None)))
    return plain_tables.launches(groups, parts[-1][1], SHAPE, padded=padded)


def form(launch: Launch) -> tuple[object, ...]:
    return launch.sparse, launch.tile, launch.chunks, launch.one, launch.levels


def test_batches_of_one_key_have_tables_of_one_form() -> None:
    """Other experts, rows and weights in the same places; not so with a matrix missing, or lists in place of planes."""
    planes, lists, more = (
        expert_rows([delta_of(kind, 0.5), delta_of(kind, 0.25)]) for kind in ("planes", "lists", "planes")
    )
    lacking = expert_rows([delta_of("planes", 0.5), None])
    both = np.arange(2)

    def key(*parts: Part) -> object:
        return BatchTables([planes, lists, more, lacking], parts, both, padded=True).key

    one = key((0, 2, ((1.0, 0),)), (2, 3, ((0.5, 1),)))
    assert one == key((0, 1, ((0.7, 2),)), (1, 2, ((2.0, 1),))) != key((0, 1, ((1.0, 3),)), (1, 2, ((1.0, 1),)))
    assert one != key((0, 2, ((1.0, 0),)), (2, 3, ((0.5, 2),)))


def test_one_column_takes_other_kernels() -> None:
    delta = pack(sparse_delta(0, (40, 1), 0.5), CPU)
    assert not BatchTables([expert_rows([delta])], [(0, 1, ((1.0, 0),))], np.arange(1), padded=True).complete
