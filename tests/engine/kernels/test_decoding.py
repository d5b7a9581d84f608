"""Native decoding against the reference: every layout at every density, and bytes that are wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.kernels import build, pack
from server.engine.kernels.build import BuildError
from server.engine.kernels.decoding import LANES, Decoder
from server.engine.kernels.types import BitPlanes, PackedDelta, SparseRows
from store.bits import pack_values, set_bits
from store.deltas import SparseDelta
from store.encodings import Encoded
from store.errors import ExpertFileError
from store.packed import PackedTernary
from store.positions import BITMAP, RICE, RICE_ZEROS
from tests.engine.kernels.builders import sparse_delta
from tests.engine.kernels.comparing import CPU, same, stored

SOURCES = tuple(source for source in build.SOURCES if source.name == "decode.cpp")
MAKERS: dict[str, Callable[[Path], Decoder]] = {
    "native": lambda folder: Decoder(build.load(folder, sources=SOURCES)),
    # The other ways, on any machine that has one of them.
    "no vectors": lambda folder: Decoder(build.load(folder, sources=SOURCES, flags=("-O1", "-DPORTABLE"))),
    "no AVX-512": lambda folder: Decoder(build.load(folder, sources=SOURCES, flags=("-O1", "-mno-avx512f"))),
}
LAYOUTS = (BITMAP, RICE, RICE_ZEROS)

shapes = st.one_of(
    st.tuples(st.integers(1, 70), st.integers(1, 200)),
    st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 70)),
    st.sampled_from([(1, 9000), (9000, 1), (3, 32800), (2, 40000), (64, 64), (33, 130)]),
)
densities = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 0.1), st.floats(0, 1))


@pytest.fixture(scope="module", params=list(MAKERS))
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    try:
        return MAKERS[request.param](tmp_path_factory.mktemp("decoding"))
    except BuildError as error:
        pytest.skip(f"cannot be built here: {error}")


def delta_of(seed: int, shape: tuple[int, ...], density: float) -> SparseDelta:
    """With one nonzero at least, as an expert file's."""
    delta = sparse_delta(seed, shape, density)
    if len(delta.indices):
        return delta
    place = np.asarray([seed % int(np.prod(shape))], np.int32)
    return SparseDelta(shape, place, np.asarray([1 - 2 * (seed % 2)], np.int8), delta.scale)


def laid_out(delta: SparseDelta, layout: str, k: int) -> PackedTernary:
    """In a layout that need not be the shortest."""
    numel, nnz = int(np.prod(delta.shape)), len(delta.indices)
    signs = np.packbits(delta.levels > 0, bitorder="little").tobytes()
    if layout == BITMAP:
        params: dict[str, int] = {}
        positions = set_bits(delta.indices, numel).tobytes()
    else:
        absent = np.setdiff1d(np.arange(numel), delta.indices)
        gaps = np.diff(delta.indices if layout == RICE else absent, prepend=-1) - 1
        unary = np.cumsum(gaps >> k, dtype=np.int64) + np.arange(len(gaps))
        params = {"k": k}
        positions = set_bits(unary, int(unary[-1]) + 1 if len(unary) else 0).tobytes()
        positions += pack_values(gaps & ((1 << k) - 1), k).tobytes()
    return PackedTernary(delta.shape, nnz, delta.scale, Encoded(layout, params, positions + signs))


def check(decoder: Decoder, tensor: PackedTernary) -> PackedDelta:
    made = decoder.decode(tensor)
    assert made is not None, "it is decoded here"
    assert same(made, pack(tensor.decode("t"), CPU, LANES))
    return made


@settings(max_examples=100, deadline=None)
@given(
    shape=shapes,
    density=densities,
    layout=st.sampled_from(LAYOUTS),
    k=st.one_of(st.integers(1, 8), st.integers(1, 24)),
    seed=st.integers(0, 99),
)
def test_any_layout_becomes_what_is_packed(
    decoder: Decoder, shape: tuple[int, ...], density: float, layout: str, k: int, seed: int
) -> None:
    check(decoder, laid_out(delta_of(seed, shape, density), layout, k))


@pytest.mark.parametrize(
    ("density", "layout", "form"),
    [(0.012, RICE, SparseRows), (0.2, RICE, BitPlanes), (0.5, BITMAP, BitPlanes), (0.9, RICE_ZEROS, BitPlanes)],
)
def test_what_the_encoder_writes(decoder: Decoder, density: float, layout: str, form: type[PackedDelta]) -> None:
    tensor = stored(sparse_delta(1, (192, 576), density))
    assert tensor.encoded.name == layout
    assert type(check(decoder, tensor)) is form


def test_what_it_does_not_know_is_left_to_others(decoder: Decoder) -> None:
    delta = sparse_delta(1, (5, 90), 0.4)
    known = stored(delta)
    assert decoder.decode(known) is not None
    assert decoder.decode(stored(sparse_delta(1, (5, 90), 0.4, top=9))) is None
    assert decoder.decode(stored(delta, grouped=True)) is None
    assert decoder.decode(stored(sparse_delta(1, (90,), 0.4))) is None
    for params in ({}, {"k": 0}, {"k": 25}, {"k": 2, "more": 1}):
        encoded = replace(known.encoded, name=RICE, params=params)
        assert decoder.decode(replace(known, encoded=encoded)) is None


@settings(max_examples=200, deadline=None)
@given(
    data=st.data(),
    density=st.sampled_from([0.0, 0.02, 0.2, 0.5, 0.9, 1.0]),
    layout=st.sampled_from(LAYOUTS),
    k=st.sampled_from([1, 2, 3, 5, 8, 13, 24]),
)
def test_what_the_reference_refuses_is_refused(
    decoder: Decoder, data: st.DataObject, density: float, layout: str, k: int
) -> None:
    """Bits flipped, streams cut short or longer, counts and parameters that are not theirs."""
    good = laid_out(delta_of(1, data.draw(st.sampled_from([(40, 70), (3, 5), (33, 64)])), density), layout, k)
    payload = bytearray(good.payload)
    for place in data.draw(st.lists(st.integers(0, 8 * len(payload) - 1), max_size=3)):
        payload[place // 8] ^= 1 << place % 8
    if data.draw(st.booleans()):
        cut = data.draw(st.integers(0, len(payload)))
        rest = payload[cut:] if data.draw(st.booleans()) else b""
        payload = payload[:cut] + data.draw(st.binary(max_size=30)) + rest
    params = good.encoded.params
    if params and data.draw(st.booleans()):
        params = {"k": data.draw(st.integers(0, 25))}
    count = st.one_of(st.just(good.nnz), st.integers(-1, 2 * good.numel), st.sampled_from([2**31, 2**62]))
    bad = replace(good, nnz=data.draw(count), encoded=Encoded(layout, params, bytes(payload)))
    try:
        expected = pack(bad.decode("t"), CPU, LANES)
    except ExpertFileError:
        assert decoder.decode(bad) is None
        return
    made = decoder.decode(bad)
    assert (made is None) == (bad.nnz == 0)
    assert made is None or same(made, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_shape_that_is_not_the_streams_own_is_refused(decoder: Decoder, layout: str) -> None:
    good = laid_out(delta_of(1, (40, 70), 0.3), layout, 3)
    for shape in ((40, 60), (1, 70), (39, 70), (0, 70)):
        assert decoder.decode(replace(good, shape=shape)) is None


@pytest.mark.parametrize("below", [0.02, 0.5])
def test_the_form_is_the_callers_choice(decoder: Decoder, below: float) -> None:
    tensor = stored(sparse_delta(4, (70, 90), 0.08))
    assert same(decoder.decode(tensor, below), pack(tensor.decode("t"), CPU, LANES, below))
