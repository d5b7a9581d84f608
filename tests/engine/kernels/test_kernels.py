"""One suite for every implementation of the kernels that runs here, and for every path through the native one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from server.engine.kernels import Group, Kernels, backend, pack
from server.engine.kernels.build import BuildError
from server.engine.kernels.byte_lists import ABREAST, IN_BYTES
from server.engine.kernels.cpu import CpuKernels
from server.engine.kernels.merging import merge_tensor_reference
from server.engine.kernels.packing import SPARSE_BELOW
from server.engine.kernels.types import (
    BitPlanes,
    ByteLists,
    DenseValues,
    LoadedDelta,
    LoadedTerm,
    Overwrites,
    SparseRows,
)
from store.deltas import SparseDelta
from store.errors import ExpertFileError
from tests.engine.kernels.builders import as_matrix, sparse_delta
from tests.engine.kernels.comparing import (
    CPU,
    Terms,
    check,
    check_fused,
    check_merge,
    check_transcode,
    device_of,
    odd_weights,
    stored,
    terms_of,
)


def triton(folder: Path) -> Kernels:
    """On a GPU. Triton's interpreter is too slow for all of this: `test_triton` has what it needs."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return backend("triton", torch.device("cuda"))


def in_bytes(folder: Path, *flags: str) -> Kernels:
    """With lists in bytes, whatever suits the machine and the type of the weights."""
    kernels = CpuKernels(folder, flags=flags)
    kernels.lanes = IN_BYTES
    return kernels


MAKERS: dict[str, Callable[[Path], Kernels]] = {
    "reference": lambda folder: backend("reference", CPU),
    "triton": triton,
    "cpu": CpuKernels,
    # The other widths, on any machine: what is an instruction elsewhere is a loop here.
    "cpu, 16 entries": lambda folder: CpuKernels(folder, flags=("-O1", "-DPERMUTE=16", "-DGATHERS=0")),
    "cpu, in bytes": lambda folder: in_bytes(folder),
    "cpu, in bytes, no vectors": lambda folder: in_bytes(folder, "-O1", "-DPORTABLE"),
    "cpu, no permutation": lambda folder: CpuKernels(folder, flags=("-O1", "-DPERMUTE=0", "-DPORTABLE")),
}

shapes = st.one_of(
    st.tuples(st.integers(1, 300)),
    st.tuples(st.integers(1, 70), st.integers(1, 100)),
    st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 40)),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(scope="module", params=[pytest.param(n, marks=pytest.mark.gpu) if n == "triton" else n for n in MAKERS])
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


@settings(max_examples=60, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_batch_equals_dense_matrices(kernels: Kernels, data: st.DataObject, dtype: torch.dtype) -> None:
    shape = data.draw(st.tuples(st.integers(1, 100), st.integers(1, 140)))
    part = st.tuples(st.integers(0, 2), st.integers(0, 20), terms_of(shape))
    check(kernels, shape, data.draw(st.lists(part, max_size=4)), dtype, data.draw(st.sampled_from([1, kernels.lanes])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "density"), [(1, 0.012), (1, 0.3), (2, 0.3), (8, 0.012), (9, 0.3), (100, 0.012), (100, 0.3)]
)
def test_shapes_of_a_model(kernels: Kernels, rows: int, density: float, dtype: torch.dtype) -> None:
    terms: Terms = [(0.75, sparse_delta(1, (192, 576), density)), (0.25, sparse_delta(2, (192, 576), density))]
    check(kernels, (192, 576), [(0, rows, terms), (1, 1, terms[:1]), (0, rows, terms[1:])], dtype)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9, 30])
@pytest.mark.parametrize("top", [1, 90])
@pytest.mark.parametrize("shape", [(96, 576), (33, 250), (200, 1536)])
@pytest.mark.parametrize("lanes", [ABREAST, IN_BYTES, None])
def test_lists_that_rows_share_are_summed_coarsely(
    folder: Path, lanes: int | None, shape: tuple[int, int], top: int, rows: int
) -> None:
    """Groups of rows one after the other, whose sums come from the same or other rows of x; of one kind, or of both."""
    kernels = CpuKernels(folder)
    deltas = [sparse_delta(seed, shape, 0.03, top=top) for seed in (1, 2)]
    packed = [pack(deltas[0], CPU, lanes or ABREAST), pack(deltas[1], CPU, lanes or IN_BYTES)]
    groups = [
        Group(0, rows, ((0.5, packed[0]), (2.0, packed[1]))),
        Group(rows, 2 * rows, ((1.0, packed[1]),)),
    ]
    x, y = torch.randn(2 * rows, shape[1]), torch.ones(2 * rows, shape[0])
    kernels.add_coarsely(y, x, groups)
    first, second = (torch.from_numpy(as_matrix(delta)).double() for delta in deltas)
    expected = torch.cat([x[:rows].double() @ (0.5 * first + 2 * second).T, x[rows:].double() @ second.T]) + 1
    moved = torch.cat(
        [(0.5 * first.abs() + 2 * second.abs()).sum(1).expand(rows, -1)] + [second.abs().sum(1)[None]] * rows
    )
    assert bool(((y.double() - expected).abs() <= 2**-15 * x.double().abs().amax(1, keepdim=True) * moved + 1e-5).all())


def test_more_rows_than_the_cache_holds(kernels: Kernels) -> None:
    terms: Terms = [(1.0, sparse_delta(1, (40, 33_000), 0.2))]
    check(kernels, (40, 33_000), [(0, 40, terms)], torch.bfloat16)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), odd=st.sampled_from([0.0, 1e-30, 1e30, float("inf"), float("nan")]))
def test_a_coarse_x_loses_at_most_its_rounding(folder: Path, data: st.DataObject, odd: float) -> None:
    """Where x may be rounded, in multiples of 2⁻¹⁵ of its row's largest number; one row has an odd number."""
    kernels = CpuKernels(folder)
    out, width = data.draw(st.tuples(st.integers(1, 100), st.integers(1, 140)))
    rows = data.draw(st.integers(1, 150))
    deltas = [(weight, delta) for weight, delta in data.draw(terms_of((out, width))) if isinstance(delta, SparseDelta)]
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))
    x[rows // 2, width // 2] = odd
    y = torch.zeros(rows, out)
    lanes = data.draw(st.sampled_from([1, ABREAST, IN_BYTES]))
    kernels.add_coarsely(y, x, [Group(0, rows, tuple((weight, pack(delta, CPU, lanes)) for weight, delta in deltas))])
    matrix = sum((weight * as_matrix(delta).astype(np.float64) for weight, delta in deltas), np.zeros((out, width)))
    moved = sum((abs(weight * as_matrix(delta)).astype(np.float64) for weight, delta in deltas), np.zeros((out, width)))
    plain = torch.isfinite(x).all(1)
    expected, most = x[plain].double() @ torch.from_numpy(matrix).T, x[plain].double().abs().amax(1, keepdim=True)
    error = (y[plain].double() - expected).abs()
    assert bool((error <= 2**-15 * most * torch.from_numpy(moved).sum(1) + 1e-37).all())


@settings(max_examples=60, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_merging_equals_the_reference_bit_for_bit(kernels: Kernels, data: st.DataObject, dtype: torch.dtype) -> None:
    shape = data.draw(st.tuples(st.integers(1, 100), st.integers(1, 140)))
    check_merge(kernels, shape, data.draw(terms_of(shape).filter(bool)), dtype, data.draw(odd_weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("shape", [(33, 250), (96, 576), (70, 1536), (40, 33_000)])
def test_merging_lists_of_many_pieces(
    kernels: Kernels, shape: tuple[int, int], experts: int, dtype: torch.dtype
) -> None:
    """Which begin anywhere within a word of a plane."""
    terms: Terms = [(0.5 + seed, sparse_delta(seed, shape, 0.03)) for seed in range(experts)]
    check_merge(kernels, shape, terms, dtype, 1.0)


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    half=st.sampled_from([torch.bfloat16, torch.float16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    weight=st.sampled_from([1.0, 0.5, -1.0]),
    beside=st.sampled_from([None, 0.02, 0.4]),
    seed=st.integers(0, 99),
)
def test_merging_what_overwrites(
    kernels: Kernels, shape: tuple[int, ...], half: torch.dtype, dtype: torch.dtype, weight: float,
    beside: float | None, seed: int,
) -> None:  # fmt: skip
    generator, device = torch.Generator().manual_seed(seed), device_of(kernels)
    pristine = torch.randn(shape, generator=generator).to(dtype)
    places = torch.nonzero(torch.rand(math.prod(shape), generator=generator) < 0.4).view(-1).int()
    own = Overwrites(shape, places, torch.randn(len(places), generator=generator).to(half))
    terms: list[LoadedTerm] = [(weight, own)]
    if beside is not None:
        terms.append((0.75, pack(sparse_delta(seed, shape, beside, top=3), CPU, kernels.lanes)))
    out = torch.full_like(pristine, 7).to(device)
    kernels.merge(out, pristine.to(device), [(weight, _on(delta, device)) for weight, delta in terms])
    torch.testing.assert_close(out.cpu(), merge_tensor_reference(pristine, terms), rtol=0, atol=0)


def _on(delta: LoadedDelta, device: torch.device) -> LoadedDelta:
    moved = {name: value.to(device) for name, value in vars(delta).items() if isinstance(value, torch.Tensor)}
    return dataclasses.replace(delta, **moved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_mix_is_left_to_torch(folder: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which merges several experts ten times more slowly."""
    kernels, shape = CpuKernels(folder), (70, 90)
    monkeypatch.setattr(kernels, "_plain", None)
    several = [pack(sparse_delta(1, shape, density, top=top), CPU, 16) for density in (0.02, 0.4) for top in (1, 9)]
    values = DenseValues(torch.ones(shape))
    news = Overwrites(shape, torch.tensor([3, 70], dtype=torch.int32), torch.ones(2, dtype=torch.bfloat16))
    for terms in ([several[0], several[2]], [several[1]], [several[3]], [values], [news], [*several, values, news]):
        kernels.merge(torch.empty(shape, dtype=dtype), torch.ones(shape, dtype=dtype), [(0.5, t) for t in terms])


@settings(max_examples=20, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_products_with_moved_weights(kernels: Kernels, data: st.DataObject, dtype: torch.dtype) -> None:
    shape = data.draw(st.tuples(st.integers(1, 100), st.integers(1, 140)))
    part = st.tuples(st.integers(0, 2), st.integers(0, 40), terms_of(shape).filter(bool))
    check_fused(kernels, shape, data.draw(st.lists(part, max_size=3)), dtype, bias=data.draw(st.booleans()))


@settings(max_examples=20, deadline=None)
@given(shape=shapes, density=st.floats(0, 1), top=st.sampled_from([1, 1, 1, 9]), seed=st.integers(0, 99))
def test_what_is_stored_becomes_what_is_packed(
    kernels: Kernels, shape: tuple[int, ...], density: float, top: int, seed: int
) -> None:
    delta = sparse_delta(seed, shape, density, top=top)
    assume(len(delta.indices))
    check_transcode(kernels, stored(delta))


@pytest.mark.parametrize("density", [0.02, 0.2, 0.5])
def test_a_damaged_tensor_is_refused_by_name(kernels: Kernels, density: float) -> None:
    good = stored(sparse_delta(1, (40, 40), density))
    payload = b"\xff" * 4 + good.payload[4:]
    bad = dataclasses.replace(good, encoded=dataclasses.replace(good.encoded, payload=payload))
    with pytest.raises(ExpertFileError, match="tensor t has") as caught:
        kernels.transcode("t", bad, device_of(kernels))
    assert caught.value.param == "t"


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


def test_forms_are_others_where_there_are_products_of_bytes(folder: Path) -> None:
    """But not for a base in float32, whose rows may not be rounded."""
    kernels = CpuKernels(folder)
    assert kernels.lists_below == SPARSE_BELOW
    kernels.prepare(torch.float32, CPU)
    assert (kernels.lists_below, kernels.lanes) == (SPARSE_BELOW, ABREAST)
    kernels.prepare(torch.bfloat16, CPU)
    below, lanes = (SPARSE_BELOW, ABREAST)
    if kernels.plane_bytes:
        below, lanes = 0.06 if kernels.plane_tiles else 0.15, IN_BYTES
    assert (kernels.lists_below, kernels.lanes) == (below, lanes)
    lists = ByteLists if kernels.plane_bytes else SparseRows
    # Levels to 9 are three digits, and two bytes per nonzero of a list in bytes.
    for top, border in ((1, below), (9, below * (1.5 if kernels.plane_bytes else 3))):
        for density in (border - 0.02, border + 0.02):
            tensor = stored(sparse_delta(1, (64, 96), density, top=top))
            assert isinstance(kernels.transcode("t", tensor, CPU), lists if density < border else BitPlanes)
            check_transcode(kernels, tensor)
