"""One suite for every implementation of the kernels that runs here, and for every path through the native one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.kernels import Group, Kernels, backend, pack
from server.engine.kernels.build import BuildError
from server.engine.kernels.cpu import CpuKernels
from server.engine.kernels.merging import merge_tensor_reference
from store.deltas import Delta, DenseDelta, SparseDelta
from tests.engine.kernels.builders import as_matrix, sparse_delta

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of the largest sum of magnitudes: rounding in any order of summation, and once to the dtype."""

Terms = list[tuple[float, Delta]]


def triton(folder: Path) -> Kernels:
    """On a GPU where there is one, else in Triton's interpreter."""
    pytest.importorskip("triton", reason="triton is not installed: a gigabyte that only GPUs need")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("there is no GPU, and TRITON_INTERPRET=1 was not set before triton was imported")
    return backend("triton", torch.device("cuda" if torch.cuda.is_available() else "cpu"))


MAKERS: dict[str, Callable[[Path], Kernels]] = {
    "reference": lambda folder: backend("reference", CPU),
    "triton": triton,
    "cpu": CpuKernels,
    # The other widths, on any machine: what is an instruction elsewhere is a loop here.
    "cpu, 16 entries": lambda folder: CpuKernels(folder, flags=("-O1", "-DPERMUTE=16")),
    "cpu, no permutation": lambda folder: CpuKernels(folder, flags=("-O1", "-DPERMUTE=0", "-DPORTABLE")),
}

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(scope="module", params=MAKERS)
def kernels(request: pytest.FixtureRequest, folder: Path) -> Kernels:
    try:
        return MAKERS[request.param](folder)
    except BuildError as error:
        pytest.skip(f"cannot be built here: {error}")


@pytest.fixture(scope="module", autouse=True)
def three_threads() -> Iterator[None]:
    """More than the blocks of a small tensor divide into evenly."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def device_of(kernels: Kernels) -> torch.device:
    return torch.device("cuda") if kernels.name == "triton" and torch.cuda.is_available() else CPU


def check(
    kernels: Kernels, shape: tuple[int, int], parts: Sequence[tuple[int, int, Terms]], dtype: torch.dtype
) -> None:
    """Compare with dense matrices in float64. `parts`: rows left out before a group, its rows, its terms."""
    out, width = shape
    rows = sum(gap + size for gap, size, _ in parts) + 1
    rng = np.random.default_rng(rows)
    device = device_of(kernels)
    y = torch.from_numpy(rng.standard_normal((rows, out))).to(device, dtype)
    x = torch.from_numpy(rng.standard_normal((rows, width))).to(device, dtype)
    expected, magnitude = y.double(), y.double().abs()
    before, x_before = y.clone(), x.clone()
    groups, touched, stop = [], torch.zeros(rows, dtype=torch.bool, device=device), 0
    for gap, size, terms in parts:
        start, stop = stop + gap, stop + gap + size
        for weight, delta in terms:
            matrix = torch.from_numpy(matrix_of(delta)).to(device).double()
            expected[start:stop] += weight * (x[start:stop].double() @ matrix.T)
            magnitude[start:stop] += abs(weight) * (x[start:stop].double().abs() @ matrix.abs().T)
        touched[start:stop] = bool(terms)
        groups.append(Group(start, stop, tuple((weight, pack(delta, device)) for weight, delta in terms)))
    kernels.add_linear(y, x, groups)
    assert bool(((y.double() - expected).abs() <= TOLERANCE[dtype] * magnitude).all())
    assert torch.equal(y[~touched], before[~touched])
    assert torch.equal(x, x_before)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_batch_equals_dense_matrices(kernels: Kernels, data: st.DataObject, dtype: torch.dtype) -> None:
    shape = data.draw(st.tuples(st.integers(1, 100), st.integers(1, 140)))
    part = st.tuples(st.integers(0, 2), st.integers(0, 20), terms_of(shape))
    check(kernels, shape, data.draw(st.lists(part, max_size=4)), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "density"), [(1, 0.012), (1, 0.3), (2, 0.3), (8, 0.012), (9, 0.3), (100, 0.012), (100, 0.3)]
)
def test_shapes_of_a_model(kernels: Kernels, rows: int, density: float, dtype: torch.dtype) -> None:
    terms: Terms = [(0.75, sparse_delta(1, (192, 576), density)), (0.25, sparse_delta(2, (192, 576), density))]
    check(kernels, (192, 576), [(0, rows, terms), (1, 1, terms[:1]), (0, rows, terms[1:])], dtype)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_merging_equals_the_reference_bit_for_bit(kernels: Kernels, data: st.DataObject, dtype: torch.dtype) -> None:
    shape = data.draw(st.tuples(st.integers(1, 100), st.integers(1, 140)))
    device = device_of(kernels)
    terms = data.draw(terms_of(shape).filter(bool))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 20)))
    pristine = torch.randn(shape, generator=generator).to(device, dtype)
    pristine[0, 0] = data.draw(st.sampled_from([0.0, -0.0, float("nan"), float("inf"), 1e-40, 3e38]))
    before, out = pristine.clone(), torch.full_like(pristine, 7)
    kernels.merge(out, pristine, [(weight, pack(delta, device)) for weight, delta in terms])
    expected = merge_tensor_reference(pristine.cpu(), [(weight, pack(delta, CPU)) for weight, delta in terms])
    torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(pristine, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("density", [0.012, 0.3])
def test_more_weight_rows_than_fit_into_the_cache(kernels: Kernels, density: float) -> None:
    check(kernels, (4200, 33), [(0, 5, [(1.0, sparse_delta(1, (4200, 33), density))])], torch.float32)


def test_no_groups_and_no_rows(kernels: Kernels) -> None:
    check(kernels, (4, 4), [], torch.float32)
    check(kernels, (4, 4), [(0, 0, [(1.0, sparse_delta(0, (4, 4), 0.5))])], torch.float32)


def test_groups_are_used_again(kernels: Kernels) -> None:
    """Their preparation may be kept, but belongs to them and not to what they looked like."""
    device = device_of(kernels)
    delta, x = pack(sparse_delta(0, (40, 50), 0.5), device), torch.ones(3, 50, device=device)
    group = Group(0, 2, ((1.0, delta),))
    results = []
    for groups in ([group], [group], [Group(0, 2, ((2.0, delta),))], [group]):
        y = torch.zeros(3, 40, device=device)
        kernels.add_linear(y, x, groups)
        results.append(y)
    assert results[0].any()
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[2], 2 * results[0])
    assert torch.equal(results[0], results[3])


def test_what_is_not_finite_spoils_its_own_row_only(kernels: Kernels) -> None:
    device = device_of(kernels)
    delta = pack(sparse_delta(0, (40, 50), 0.5), device)
    x = torch.ones(10, 50, device=device)
    x[3, 7] = float("nan")
    for rows in ((0, 10), (3, 4)):
        y = torch.zeros(10, 40, device=device)
        kernels.add_linear(y, x, [Group(*rows, ((1.0, delta),))])
        assert y[3].isnan().any()
        assert not torch.cat([y[:3], y[4:]]).isnan().any()
