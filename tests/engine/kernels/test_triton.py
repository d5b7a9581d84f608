"""The Triton kernels in Triton's interpreter, which is slow: every path of them, on few and tiny batches.

`test_kernels` runs all that it has on a GPU; `test_triton_compiles` says whether a compiler takes what runs here.
"""

from __future__ import annotations

import gc
import os
import weakref
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from server.engine.kernels import Group, Kernels, backend, pack
from server.engine.kernels.types import BitPlanes, SparseRows
from store.bits import bytes_for
from store.deltas import DenseDelta, SparseDelta
from store.errors import ExpertFileError
from store.packed import PackedTernary
from tests.engine.kernels.builders import sparse_delta
from tests.engine.kernels.comparing import (
    CPU,
    Terms,
    check,
    check_fused,
    check_merge,
    check_transcode,
    odd_weights,
    stored,
    terms_of,
)

triton = pytest.importorskip("triton", reason="triton is not installed")
if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=1 was not set, or there is a GPU", allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
few = settings(max_examples=12, deadline=None)
tiny = st.tuples(st.integers(1, 70), st.integers(1, 140))


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return backend("triton", CPU)


def deltas(density: float, *, top: int = 1, shape: tuple[int, int] = (40, 300)) -> Terms:
    return [(0.75, sparse_delta(7, shape, density, top=top))]


@few
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_any_batch_equals_dense_matrices(kernels: Kernels, data: st.DataObject, dtype: torch.dtype) -> None:
    shape = data.draw(tiny)
    part = st.tuples(st.integers(0, 2), st.integers(0, 20), terms_of(shape))
    check(kernels, shape, data.draw(st.lists(part, max_size=2)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4, 5, 17, 33, 70])
@pytest.mark.parametrize(("density", "top"), [(0.02, 1), (0.02, 3), (0.3, 1), (0.3, 6)])
def test_groups_of_every_size(kernels: Kernels, rows: int, density: float, top: int, dtype: torch.dtype) -> None:
    """Each size has a tile of its own; planes this wide are shared between blocks that add up in one of them."""
    if dtype is not DTYPES[rows % 3]:
        return
    check(kernels, (40, 300), [(1, rows, deltas(density, top=top)), (0, 1, deltas(0.3)), (0, 2, deltas(0.02))], dtype)


@pytest.mark.parametrize("out", [64, 130])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_columns_of_few_rows_are_split(kernels: Kernels, out: int, dtype: torch.dtype) -> None:
    """Twice, since blocks count who has arrived, and have to begin at zero again."""
    for _ in range(2):
        check(kernels, (out, 520), [(0, 3, deltas(0.4, shape=(out, 520)))], dtype)


def test_terms_of_different_forms_are_rounded_once(kernels: Kernels) -> None:
    """Each moves a sum by less than bfloat16 resolves, two together move it."""
    step, one = 1.5 / 512, np.zeros(1, np.int32)
    planes = pack(SparseDelta((1, 2), one, np.ones(1, np.int8), step), CPU)
    lists = pack(SparseDelta((1, 20), one, np.ones(1, np.int8), step), CPU)
    assert isinstance(planes, BitPlanes)
    assert isinstance(lists, SparseRows)
    planes = replace(planes, shape=(1, 20))  # both are one block of 32 columns
    dense = pack(DenseDelta(np.eye(1, 20, dtype=np.float32) * np.float32(step)), CPU)
    x = torch.ones(1, 20, dtype=torch.bfloat16)
    for terms in ([planes, lists], [lists, dense], [planes, dense]):
        y = torch.ones(1, 1, dtype=torch.bfloat16)
        kernels.add_linear(y, x, [Group(0, 1, tuple((1.0, delta) for delta in terms))])
        assert y.item() == 1 + 1 / 128


@few
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_products_with_moved_weights(kernels: Kernels, data: st.DataObject, dtype: torch.dtype) -> None:
    shape = data.draw(tiny)
    part = st.tuples(st.integers(0, 2), st.integers(0, 40), terms_of(shape).filter(bool))
    check_fused(kernels, shape, data.draw(st.lists(part, max_size=2)), dtype, bias=data.draw(st.booleans()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_with_planes_in_tiles(kernels: Kernels, dtype: torch.dtype) -> None:
    """More rows than a tile has, in both directions, and a second group that is not of planes."""
    shape = (150, 70)
    parts = [(2, 140, deltas(0.4, shape=shape)), (1, 3, deltas(0.02, shape=shape))]
    check_fused(kernels, shape, parts, dtype, bias=True)


@few
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_merging_equals_the_reference_bit_for_bit(kernels: Kernels, data: st.DataObject, dtype: torch.dtype) -> None:
    shape = data.draw(tiny)
    check_merge(kernels, shape, data.draw(terms_of(shape).filter(bool)), dtype, data.draw(odd_weights))


def test_large_tensors_go_through_the_cache_in_slabs(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.kernels.gpu_moving.SLAB_BYTES", 4096)
    shape = (130, 24)
    terms: Terms = [(w, sparse_delta(i, shape, d, top=t)) for i, (w, d, t) in enumerate([(1, 0.05, 1), (0.3, 0.4, 5)])]
    terms.append((0.7, DenseDelta(np.random.default_rng(0).standard_normal(shape, np.float32))))
    check_merge(kernels, shape, terms, torch.bfloat16, 0.0)
    check_fused(kernels, shape, [(0, 5, terms), (1, 2, terms[:1])], torch.bfloat16, bias=True)


@pytest.mark.parametrize("shape", [(9,), (2, 33, 7)])
def test_vectors_and_stacks_are_merged(kernels: Kernels, shape: tuple[int, ...]) -> None:
    delta = sparse_delta(3, shape, 0.5)
    pristine = torch.randn(shape)
    out = torch.empty_like(pristine)
    kernels.merge(out, pristine, [(0.5, pack(delta, CPU))])
    expected = pristine.view(-1).clone()
    expected[torch.from_numpy(delta.indices).long()] += torch.from_numpy(delta.levels) * np.float32(0.5 * delta.scale)
    assert torch.equal(out.view(-1), expected)


@few
@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 99)), st.tuples(st.integers(1, 2), st.integers(1, 33), st.integers(1, 70))
    ),
    density=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_what_is_stored_becomes_what_is_packed(
    kernels: Kernels, shape: tuple[int, ...], density: float, seed: int
) -> None:
    delta = sparse_delta(seed, shape, density)
    assume(len(delta.indices))
    check_transcode(kernels, stored(delta))


@pytest.mark.parametrize(("density", "name"), [(0.02, "rice"), (0.2, "rice"), (0.5, "bitmap"), (0.9, "rice-zeros")])
def test_every_encoding_is_transcoded(kernels: Kernels, density: float, name: str) -> None:
    tensor = stored(sparse_delta(1, (70, 130), density))
    assert tensor.encoded.name == name
    check_transcode(kernels, tensor)


def test_what_a_device_does_not_decode_is_decoded_before(kernels: Kernels) -> None:
    check_transcode(kernels, stored(sparse_delta(1, (5, 9), 0.4, top=9)))
    check_transcode(kernels, stored(sparse_delta(1, (5, 9), 0.4), grouped=True))


@pytest.mark.parametrize("density", [0.2, 0.5])
def test_a_stream_that_holds_too_much_is_refused(kernels: Kernels, density: float) -> None:
    good = stored(sparse_delta(1, (40, 40), density))
    with pytest.raises(ExpertFileError, match="ones instead of"):
        kernels.transcode("t", with_payload(good, b"\xff" * 4 + good.payload[4:]), CPU)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), density=st.sampled_from([0.02, 0.2, 0.5, 0.9]))
def test_wrong_bytes_are_refused_or_harmless(kernels: Kernels, data: st.DataObject, density: float) -> None:
    """What a decoder on the host accepts becomes the same; what it refuses is refused, or differs in what says nothing
    (padding, bytes after the end)."""
    good = stored(sparse_delta(1, (40, 70), density))
    payload = bytearray(good.payload)
    if data.draw(st.booleans()):
        for place in data.draw(st.lists(st.integers(0, 8 * len(payload) - 1), max_size=3)):
            payload[place // 8] ^= 1 << place % 8
    else:
        payload = payload[: data.draw(st.integers(0, len(payload)))] + data.draw(st.binary(max_size=9))
    bad = with_payload(good, bytes(payload))
    try:
        bad.decode("t")
    except ExpertFileError:
        with suppress(ExpertFileError):
            made = kernels.transcode("t", bad, CPU)
            assert made.nbytes == kernels.transcode("t", good, CPU).nbytes
    else:
        check_transcode(kernels, bad)


def test_gaps_that_lead_beyond_the_tensor_are_refused(kernels: Kernels) -> None:
    good = stored(sparse_delta(1, (40, 70), 0.02))
    k = good.encoded.params["k"]
    signs, remainders = bytes_for(good.nnz), bytes_for(good.nnz * k)
    unary = len(good.payload) - signs - remainders
    payload = good.payload[:unary] + b"\xff" * remainders + good.payload[-signs:]
    with pytest.raises(ExpertFileError, match="do not ascend below"):
        kernels.transcode("t", with_payload(good, payload), CPU)


def with_payload(tensor: PackedTernary, payload: bytes) -> PackedTernary:
    return replace(tensor, encoded=replace(tensor.encoded, payload=payload))


def test_one_column(kernels: Kernels) -> None:
    check(kernels, (40, 1), [(0, 3, deltas(0.5, shape=(40, 1))), (0, 40, deltas(0.02, shape=(40, 1)))], torch.bfloat16)
    check_fused(kernels, (40, 1), [(0, 3, deltas(0.5, shape=(40, 1)))], torch.bfloat16, bias=True)


def test_plans_are_kept_for_groups_but_do_not_keep_them() -> None:
    from server.engine.kernels.gpu_tables import Plans

    plans = Plans()
    groups = [Group(0, 2, ((1.0, pack(sparse_delta(0, (40, 50), 0.5), CPU)),)), Group(2, 3, ())]
    first = plans.of(groups, 3, (40, 50), CPU)
    assert plans.of(list(groups), 3, (40, 50), CPU) is first
    assert plans.of(groups[:1], 3, (40, 50), CPU) is not first
    seen = weakref.ref(groups[0])
    del groups
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize("group", [(-1, 2), (1, 9)])
def test_groups_beyond_the_rows_are_refused(kernels: Kernels, group: tuple[int, int]) -> None:
    delta = pack(sparse_delta(0, (40, 50), 0.5), CPU)
    x, y, weight = torch.ones(3, 50), torch.zeros(3, 40), torch.zeros(40, 50)
    with pytest.raises(ValueError, match="not within 3 rows"):
        kernels.add_linear(y, x, [Group(*group, ((1.0, delta),))])
    with pytest.raises(ValueError, match="not within 3 rows"):
        kernels.fused_linear(y, x, weight, None, [Group(*group, ((1.0, delta),))])
    with pytest.raises(ValueError, match="cannot be applied"):
        kernels.add_linear(y, x[:, :49].contiguous(), [Group(0, 1, ((1.0, delta),))])


def test_tables_of_weights_that_clients_choose_do_not_pile_up() -> None:
    """One of each delta, at the last weight."""
    from server.engine.kernels.gpu_moving import Mover

    mover, delta = Mover(None), pack(sparse_delta(1, (64, 64), 0.3), CPU)
    made = [mover.table([(0.5 + i / 1000, delta)], first_row) for i in range(100) for first_row in (0, 32)]
    assert len(mover._terms[delta]) == 2
    assert mover.table([(0.5 + 99 / 1000, delta)]) is made[-2]
    assert mover.table([(0.5, delta)]).tolist() == made[0].tolist()
