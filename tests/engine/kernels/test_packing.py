from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.kernels import dense, gather_rows, pack, packed_bytes, packed_fields
from server.engine.kernels.byte_lists import ABREAST, IN_BYTES
from server.engine.kernels.packing import SPARSE_BELOW
from server.engine.kernels.types import PIECE, BitPlanes, ByteLists, DenseValues, SparseRows
from server.engine.parcel import parcel_bytes, wrap
from store.deltas import DenseDelta, SparseDelta
from tests.engine.kernels.builders import as_matrix, sparse_delta

CPU = torch.device("cpu")

shapes = st.one_of(
    st.tuples(st.integers(1, 70), st.integers(1, 100)),
    st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 40)),
)


@settings(max_examples=150, deadline=None)
@given(
    shape=shapes,
    density=st.one_of(st.just(0.0), st.floats(0, 0.1), st.floats(0, 1), st.just(1.0)),
    top=st.sampled_from([1, 1, 2, 4, 5, 7, 13, 14, 40, 41, 121, 127]),
    seed=st.integers(0, 2**32 - 1),
    lanes=st.sampled_from([1, ABREAST, IN_BYTES]),
    below=st.sampled_from([0.03, SPARSE_BELOW, 0.4]),
)
def test_what_is_packed_is_found_again(
    shape: tuple[int, ...], density: float, top: int, seed: int, lanes: int, below: float
) -> None:
    """And takes the bytes that were announced, or no more of them."""
    delta = sparse_delta(seed, shape, density, top=top)
    packed = pack(delta, CPU, lanes, below)
    assert packed.shape == shape
    top = top if len(delta.levels) else 1
    announced = parcel_bytes(packed_fields(shape, len(delta.indices), top, below, lanes))
    if lanes == IN_BYTES:
        assert wrap("d" * 64, announced, [("t", packed)], exact=False).nbytes <= announced
    else:
        assert packed.nbytes == sum(packed_fields(shape, len(delta.indices), top, below))
    torch.testing.assert_close(dense(packed).view(-1, shape[-1]), torch.from_numpy(as_matrix(delta)), rtol=1e-6, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    shape=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    density=st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_rows_are_gathered_in_any_order_and_number(
    data: st.DataObject, shape: tuple[int, int], density: float, seed: int
) -> None:
    rows = data.draw(st.lists(st.integers(0, shape[0] - 1), max_size=20))
    delta = sparse_delta(seed, shape, density)
    packed = pack(delta, CPU, data.draw(st.sampled_from([1, ABREAST, IN_BYTES])))
    gathered = gather_rows(packed, torch.tensor(rows, dtype=torch.int64))
    assert gathered.dtype == torch.float32
    torch.testing.assert_close(gathered, torch.from_numpy(as_matrix(delta)[rows]).view(-1, shape[1]))


def test_the_planes_are_laid_out_as_documented() -> None:
    delta = sparse_delta(3, (40, 70), 0.5, top=4)
    packed = pack(delta, CPU)
    assert isinstance(packed, BitPlanes)
    levels = np.zeros((40, 70), int)
    levels.reshape(-1)[delta.indices] = delta.levels
    for row, column in np.ndindex(levels.shape):
        words = packed.words[row // 32, :, column // 32, :, row % 32] >> column % 32 & 1
        assert sum(3**k * int(plus - minus) for k, (plus, minus) in enumerate(words)) == levels[row, column]
    assert not packed.words[1, :, :, :, 8:].any()
    assert not (packed.words[:, :, 2] >> 6 & (1 << 26) - 1).any()


@settings(max_examples=60, deadline=None)
@given(shape=st.tuples(st.integers(1, 100), st.integers(1, 140)), density=st.floats(0, 0.09), seed=st.integers(0, 99))
def test_lists_that_lie_abreast_hold_the_same(shape: tuple[int, int], density: float, seed: int) -> None:
    """Rank by rank, and of each rank in the order of the lists."""
    delta = sparse_delta(seed, shape, density, top=3)
    plain, abreast = pack(delta, CPU), pack(delta, CPU, 16)
    if not isinstance(plain, SparseRows):
        return
    assert isinstance(abreast, SparseRows)
    assert torch.equal(dense(plain), dense(abreast))
    starts, expected = plain.starts.tolist(), []
    for first in range(0, shape[0], 16):
        lists = [plain.entries[a:b].tolist() for a, b in itertools.pairwise(starts[first : first + 17])]
        expected += [own[rank] for rank in range(len(lists[0])) for own in lists if rank < len(own)]
    assert abreast.entries.tolist() == expected
    assert torch.equal(plain.order, abreast.order)
    assert torch.equal(plain.starts, abreast.starts)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 100), st.integers(1, 500)),
    density=st.floats(0, 0.09),
    top=st.sampled_from([1, 3]),
    seed=st.integers(0, 99),
)
def test_lists_in_bytes_are_laid_out_as_documented(shape: tuple[int, int], density: float, top: int, seed: int) -> None:
    plain, packed = (pack(sparse_delta(seed, shape, density, top=top), CPU, lanes) for lanes in (1, IN_BYTES))
    if not isinstance(packed, ByteLists):
        return
    assert isinstance(plain, SparseRows)
    assert packed.width <= PIECE
    starts, spans = plain.starts.tolist(), [*itertools.pairwise(packed.starts.tolist())]
    for row in range(shape[0]):
        place = row // 32 * 32 + int(packed.places[row])
        assert plain.order[place] == row
        found = []
        for vector in range(*spans[place // 16]):
            for k, entry in enumerate(packed.entries[vector, place % 16].tolist()):
                level = 1 if packed.levels is None else int(packed.levels[vector, place % 16, k])
                if entry % 128 != PIECE:
                    column = int(packed.pieces[vector]) * packed.width + entry % 128
                    found.append((2 * column + entry // 128, level))
        span = slice(starts[place], starts[place + 1])
        levels = [1] * len(found) if plain.levels is None else plain.levels[span].tolist()
        assert found == [*zip(plain.entries[span].tolist(), levels, strict=True)]
    for (first, last), group in zip(spans, range(len(spans)), strict=True):
        assert (packed.pieces[first:last].diff().int() >= 0).all(), group


@pytest.mark.parametrize(("rows", "form"), [(1, SparseRows), (3, BitPlanes)])
def test_lists_that_would_waste_too_much_in_bytes_are_not(rows: int, form: type) -> None:
    """All nonzeros in a few rows of each 32: most bytes would be empty."""
    places = np.arange(64 * 600, dtype=np.int32)
    places = places[places // 600 % 32 < rows]
    delta = SparseDelta((64, 600), places, np.ones(len(places), np.int8), 1.0)
    packed = pack(delta, CPU, IN_BYTES)
    assert type(packed) is form
    assert getattr(packed, "lanes", ABREAST) == ABREAST
    announced = parcel_bytes(packed_fields((64, 600), len(places), lanes=IN_BYTES))
    assert wrap("d" * 64, announced, [("t", packed)], exact=False).nbytes <= announced


def test_density_decides_the_form() -> None:
    shape = (64, 64)
    at = int(SPARSE_BELOW * 64 * 64)
    few = SparseDelta(shape, np.arange(at, dtype=np.int32), np.ones(at, np.int8), 1.0)
    many = SparseDelta(shape, np.arange(at + 1, dtype=np.int32), np.ones(at + 1, np.int8), 1.0)
    assert isinstance(pack(few, CPU), SparseRows)
    assert isinstance(pack(many, CPU), BitPlanes)


def test_a_tensor_too_wide_for_sixteen_bits_is_packed_in_planes() -> None:
    wide = SparseDelta((1, 40_000), np.array([39_999], np.int32), np.array([-1], np.int8), 0.5)
    packed = pack(wide, CPU)
    assert isinstance(packed, BitPlanes)
    assert dense(packed)[0, 39_999] == -0.5
    widest = SparseDelta((1, 1 << 15), np.array([(1 << 15) - 1], np.int32), np.array([-1], np.int8), 0.5)
    packed = pack(widest, CPU)
    assert isinstance(packed, SparseRows)
    assert dense(packed)[0, -1] == -0.5


@pytest.mark.parametrize("shape", [(5,), (3, 4), ()])
def test_dense_deltas_stay_as_they_are(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    values = np.asarray(values, np.float32)
    packed = pack(DenseDelta(values), CPU)
    assert isinstance(packed, DenseValues)
    assert packed.shape == shape
    assert packed.nbytes == packed_bytes(shape, None) == values.nbytes
    torch.testing.assert_close(dense(packed), torch.from_numpy(values), rtol=0, atol=0)


def test_a_ternary_vector_becomes_dense() -> None:
    delta = SparseDelta((9,), np.array([2, 8], np.int32), np.array([1, -1], np.int8), 0.25)
    packed = pack(delta, CPU)
    assert dense(packed).tolist() == [0, 0, 0.25, 0, 0, 0, 0, 0, -0.25]
    assert packed.nbytes == packed_bytes((9,), 2)


def test_the_density_where_lists_end_is_the_caller_s() -> None:
    delta = sparse_delta(1, (64, 64), 0.08)
    lists, planes = (pack(delta, CPU, lists_below=below) for below in (0.1, 0.06))
    assert isinstance(lists, SparseRows)
    assert isinstance(planes, BitPlanes)
    for below, packed in ((0.1, lists), (0.06, planes)):
        assert sum(packed_fields((64, 64), len(delta.indices), 1, below)) == packed.nbytes
    assert torch.equal(dense(lists), dense(planes))
