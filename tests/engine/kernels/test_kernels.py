"""One suite for every implementation of the kernels that runs here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.kernels import Group, available, backend, pack
from store.deltas import Delta, DenseDelta, SparseDelta
from store.errors import InvalidRequestError
from tests.engine.kernels.builders import as_matrix, sparse_delta

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of the largest sum of magnitudes: rounding in any order of summation, and once to the dtype."""

Terms = list[tuple[float, Delta]]

weights = st.one_of(st.just(1.0), st.floats(-2, 3, width=32))
densities = st.one_of(st.just(0.0), st.floats(0, 0.06), st.floats(0, 1), st.just(1.0))
tops = st.sampled_from([1, 1, 1, 1, 3, 7, 40, 127])


@st.composite
def terms_of(draw: st.DrawFn, shape: tuple[int, int]) -> Terms:
    terms: Terms = []
    for _ in range(draw(st.integers(0, 3))):
        seed = draw(st.integers(0, 2**32 - 1))
        delta: Delta
        if draw(st.integers(0, 5)) == 0:
            delta = DenseDelta(np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(0.01))
        else:
            delta = sparse_delta(seed, shape, draw(densities), top=draw(tops))
        terms.append((draw(weights), delta))
    return terms


def matrix_of(delta: Delta) -> np.ndarray:
    return as_matrix(delta) if isinstance(delta, SparseDelta) else delta.values


def check(
    implementation: str, shape: tuple[int, int], parts: Sequence[tuple[int, int, Terms]], dtype: torch.dtype
) -> None:
    """Compare with dense matrices in float64. `parts`: rows left out before a group, its rows, its terms."""
    out, width = shape
    rows = sum(gap + size for gap, size, _ in parts) + 1
    rng = np.random.default_rng(rows)
    y = torch.from_numpy(rng.standard_normal((rows, out))).to(dtype)
    x = torch.from_numpy(rng.standard_normal((rows, width))).to(dtype)
    expected, magnitude = y.double(), y.double().abs()
    before, x_before = y.clone(), x.clone()
    groups, touched, stop = [], torch.zeros(rows, dtype=torch.bool), 0
    for gap, size, terms in parts:
        start, stop = stop + gap, stop + gap + size
        for weight, delta in terms:
            matrix = torch.from_numpy(matrix_of(delta)).double()
            expected[start:stop] += weight * (x[start:stop].double() @ matrix.T)
            magnitude[start:stop] += abs(weight) * (x[start:stop].double().abs() @ matrix.abs().T)
        touched[start:stop] = bool(terms)
        groups.append(Group(start, stop, tuple((weight, pack(delta, CPU)) for weight, delta in terms)))
    backend(implementation, CPU).add_linear(y, x, groups)
    assert bool(((y.double() - expected).abs() <= TOLERANCE[dtype] * magnitude).all())
    assert torch.equal(y[~touched], before[~touched])
    assert torch.equal(x, x_before)


@pytest.mark.parametrize("implementation", [name for name, why in available(CPU).items() if why is None])
class TestKernels:
    @settings(max_examples=150, deadline=None)
    @given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
    def test_any_batch_equals_dense_matrices(
        self, implementation: str, data: st.DataObject, dtype: torch.dtype
    ) -> None:
        shape = data.draw(st.tuples(st.integers(1, 100), st.integers(1, 140)))
        part = st.tuples(st.integers(0, 2), st.integers(0, 20), terms_of(shape))
        check(implementation, shape, data.draw(st.lists(part, max_size=4)), dtype)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("density", [0.012, 0.3])
    @pytest.mark.parametrize("rows", [1, 2, 8, 9, 100])
    def test_shapes_of_a_model(self, implementation: str, rows: int, density: float, dtype: torch.dtype) -> None:
        terms: Terms = [(0.75, sparse_delta(1, (192, 576), density)), (0.25, sparse_delta(2, (192, 576), density))]
        check(implementation, (192, 576), [(0, rows, terms), (1, 1, terms[:1]), (0, rows, terms[1:])], dtype)

    def test_no_groups_and_no_rows(self, implementation: str) -> None:
        check(implementation, (4, 4), [], torch.float32)
        check(implementation, (4, 4), [(0, 0, [(1.0, sparse_delta(0, (4, 4), 0.5))])], torch.float32)


def test_an_unknown_implementation_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"must be auto, .*; not abacus") as caught:
        backend("abacus", CPU)
    assert caught.value.param == "kernels"


def test_there_is_always_one() -> None:
    assert available(CPU)["reference"] is None
    assert backend("reference", CPU).name == "reference"
    assert available(CPU)[backend("auto", CPU).name] is None
