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
from server.engine.kernels.byte_lists import ABREAST, IN_BYTES
from server.engine.kernels.decoding import Decoder
from server.engine.kernels.types import BitPlanes, PackedDelta, SparseRows
from store.bits import pack_values, set_bits
from store.deltas import OverwriteDelta, SparseDelta
from store.encodings import Encoded, encode_levels, encode_steps
from store.errors import ExpertFileError
from store.packed import PackedLevels, PackedOverwrite, PackedTernary
from store.patterns import Half
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
parameters = st.one_of(st.integers(1, 8), st.integers(1, 24))
Spread = tuple[str, float]
# So that every kind of node occurs in the trees of numbers.
spreads = st.one_of(
    st.tuples(st.sampled_from(["low", "high"]), st.sampled_from([0.02, 0.1, 0.4, 0.7, 0.95])),
    st.sampled_from([("even", 0.0), ("same", 0.0)]),
)


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


def spread_out(rng: np.random.Generator, count: int, top: int, spread: Spread) -> np.ndarray:
    """`count` whole numbers from 1 to `top`, `top` among them, that often negative."""
    kind, peak = spread
    if kind in ("even", "same"):
        numbers = rng.integers(1 if kind == "even" else top, top, count, endpoint=True)
    else:
        numbers = np.minimum(rng.geometric(peak, count), top)
        numbers = numbers if kind == "low" else top + 1 - numbers
    numbers[:1] = top
    return np.where(rng.random(count) < (0.5 if kind == "even" else 0.9), numbers, -numbers)


def positions_in(layout: str, k: int, indices: np.ndarray, numel: int) -> tuple[dict[str, int], bytes]:
    """In a layout that need not be the shortest."""
    if layout == BITMAP:
        return {}, set_bits(indices, numel).tobytes()
    absent = np.setdiff1d(np.arange(numel), indices)
    gaps = np.diff(indices if layout == RICE else absent, prepend=-1) - 1
    unary = np.cumsum(gaps >> k, dtype=np.int64) + np.arange(len(gaps))
    positions = set_bits(unary, int(unary[-1]) + 1 if len(unary) else 0).tobytes()
    return {"k": k}, positions + pack_values(gaps & ((1 << k) - 1), k).tobytes()


def relaid(encoded: Encoded, own: tuple[str, ...], layout: str, k: int, delta: SparseDelta) -> Encoded:
    """Other positions before the same values, which the parameters `own` tell of: those of `delta`."""
    values = {name: encoded.params[name] for name in own}
    length = sum(size for name, size in values.items() if name != "top")
    params, positions = positions_in(layout, k, delta.indices, int(np.prod(delta.shape)))
    return Encoded(layout, {**params, **values}, positions + encoded.payload[len(encoded.payload) - length :])


def laid_out(delta: SparseDelta, layout: str, k: int) -> PackedTernary:
    numel, nnz = int(np.prod(delta.shape)), len(delta.indices)
    params, positions = positions_in(layout, k, delta.indices, numel)
    signs = np.packbits(delta.levels > 0, bitorder="little").tobytes()
    return PackedTernary(delta.shape, nnz, delta.scale, Encoded(layout, params, positions + signs))


def levels_laid_out(delta: SparseDelta, layout: str, k: int, top: int, spread: Spread) -> PackedLevels:
    """Levels up to `top` where the delta has its nonzeros."""
    numel, nnz = int(np.prod(delta.shape)), len(delta.indices)
    levels = spread_out(np.random.default_rng(nnz), nnz, top, spread).astype(np.int8)
    encoded = relaid(encode_levels(delta.indices, levels, numel), ("top", "values"), layout, k, delta)
    return PackedLevels(delta.shape, nnz, delta.scale, encoded)


def overwrite_laid_out(delta: SparseDelta, layout: str, k: int, top: int, spread: Spread) -> PackedOverwrite:
    """Steps up to `top` where the delta has its nonzeros."""
    numel, nnz = int(np.prod(delta.shape)), len(delta.indices)
    steps = spread_out(np.random.default_rng(nnz), nnz, top, spread).astype(np.int16)
    encoded = relaid(encode_steps(delta.indices, steps, numel), ("high", "low"), layout, k, delta)
    return PackedOverwrite(delta.shape, nnz, encoded, Half.BF16, "0" * 64)


def same_overwrite(made: OverwriteDelta, expected: OverwriteDelta) -> bool:
    for ours, theirs in ((made.indices, expected.indices), (made.steps, expected.steps)):
        np.testing.assert_array_equal(ours, theirs, strict=True)
    return (made.shape, made.half, made.sha256) == (expected.shape, expected.half, expected.sha256)


def check(decoder: Decoder, tensor: PackedTernary) -> PackedDelta:
    decoded = tensor.decode("t")
    made = {lanes: decoder.decode(tensor, lanes=lanes) for lanes in (ABREAST, IN_BYTES)}
    for lanes, packed in made.items():
        assert packed is not None, "it is decoded here"
        assert same(packed, pack(decoded, CPU, lanes))
    return made[ABREAST]


@settings(max_examples=100, deadline=None)
@given(
    shape=shapes,
    density=densities,
    layout=st.sampled_from(LAYOUTS),
    k=parameters,
    seed=st.integers(0, 99),
)
def test_any_layout_becomes_what_is_packed(
    decoder: Decoder, shape: tuple[int, ...], density: float, layout: str, k: int, seed: int
) -> None:
    check(decoder, laid_out(delta_of(seed, shape, density), layout, k))


@settings(max_examples=100, deadline=None)
@given(
    shape=shapes,
    density=densities,
    layout=st.sampled_from(LAYOUTS),
    k=parameters,
    top=st.one_of(st.sampled_from([1, 2, 4, 5, 13, 14, 40, 41, 121, 122, 127]), st.integers(1, 127)),
    spread=spreads,
)
def test_levels_of_any_size_become_what_is_packed(
    decoder: Decoder, shape: tuple[int, ...], density: float, layout: str, k: int, top: int, spread: Spread
) -> None:
    check(decoder, levels_laid_out(delta_of(top, shape, density), layout, k, top, spread))


@settings(max_examples=100, deadline=None)
@given(
    shape=st.one_of(shapes, st.tuples(st.integers(1, 9000))),
    density=densities,
    layout=st.sampled_from(LAYOUTS),
    k=parameters,
    top=st.one_of(st.sampled_from([1, 127, 128, 129, 2**15 - 1]), st.integers(1, 2**15 - 1)),
    spread=spreads,
)
def test_overwrites_become_what_is_decoded(
    decoder: Decoder, shape: tuple[int, ...], density: float, layout: str, k: int, top: int, spread: Spread
) -> None:
    tensor = overwrite_laid_out(delta_of(top, shape, density), layout, k, top, spread)
    made = decoder.decode_overwrite(tensor)
    assert made is not None
    assert same_overwrite(made, tensor.decode("t"))


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
    assert decoder.decode(stored(delta, grouped=True)) is None
    assert decoder.decode(stored(sparse_delta(1, (90,), 0.4))) is None
    for params in ({}, {"k": 0}, {"k": 25}, {"k": 2, "more": 1}):
        encoded = replace(known.encoded, name=RICE, params=params)
        assert decoder.decode(replace(known, encoded=encoded)) is None
    levels = stored(sparse_delta(1, (5, 90), 0.4, top=9))
    assert decoder.decode(levels) is not None
    assert decoder.decode(replace(levels, scale=1e38)) is None
    for name, value in (("top", 0), ("top", 128), ("values", 0), ("values", -1), ("values", 2**70), ("more", 1)):
        encoded = replace(levels.encoded, params={**levels.encoded.params, name: value})
        assert decoder.decode(replace(levels, encoded=encoded)) is None


def damaged(data: st.DataObject, payload: bytes) -> bytes:
    """Bits flipped, streams cut short or longer."""
    bad = bytearray(payload)
    for place in data.draw(st.lists(st.integers(0, 8 * len(bad) - 1), max_size=3)):
        bad[place // 8] ^= 1 << place % 8
    if not data.draw(st.booleans()):
        return bytes(bad)
    cut = data.draw(st.integers(0, len(bad)))
    rest = bad[cut:] if data.draw(st.booleans()) else b""
    return bytes(bad[:cut] + data.draw(st.binary(max_size=30)) + rest)


def counts(good: int, most: int) -> st.SearchStrategy[int]:
    return st.one_of(st.just(good), st.just(good), st.integers(-1, most), st.sampled_from([2**31, 2**62]))


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
    good = laid_out(delta_of(1, data.draw(st.sampled_from([(40, 70), (3, 5), (33, 64)])), density), layout, k)
    params = good.encoded.params
    if len(params) and data.draw(st.booleans()):
        params = {"k": data.draw(st.integers(0, 25))}
    nnz = data.draw(counts(good.nnz, 2 * good.numel))
    bad = replace(good, nnz=nnz, encoded=Encoded(layout, params, damaged(data, good.payload)))
    lanes = data.draw(st.sampled_from([ABREAST, IN_BYTES]))
    try:
        expected = pack(bad.decode("t"), CPU, lanes)
    except ExpertFileError:
        assert decoder.decode(bad, lanes=lanes) is None
        return
    made = decoder.decode(bad, lanes=lanes)
    assert (made is None) == (bad.nnz == 0)
    assert made is None or same(made, expected)


@settings(max_examples=200, deadline=None)
@given(
    data=st.data(),
    shape=st.sampled_from([(40, 70), (3, 5), (2, 4200)]),
    density=st.sampled_from([0.0, 0.02, 0.2, 0.9, 1.0]),
    layout=st.sampled_from(LAYOUTS),
    top=st.sampled_from([1, 3, 40, 127]),
    spread=spreads,
)
def test_damaged_values_are_refused_as_the_reference_does(
    decoder: Decoder, data: st.DataObject, shape: tuple[int, int], density: float, layout: str, top: int, spread: Spread
) -> None:
    """The same of the trees of values, whose sizes and counts may be wrong in themselves and to each other."""
    laid, most = data.draw(st.sampled_from([(levels_laid_out, top), (overwrite_laid_out, 200 * top)]))
    tensor = laid(delta_of(1, shape, density), layout, 3, most, spread)
    params = dict(tensor.encoded.params)
    if data.draw(st.booleans()):
        name = data.draw(st.sampled_from(sorted(params)))
        params[name] = data.draw(counts(params[name], len(tensor.payload) + 2))
    start = data.draw(st.sampled_from([0, max(0, len(tensor.payload) - 40)]))
    payload = tensor.payload[:start] + damaged(data, tensor.payload[start:])
    nnz = data.draw(counts(tensor.nnz, tensor.numel))
    bad = replace(tensor, nnz=nnz, encoded=Encoded(layout, params, payload))
    made = decoder.decode(bad) if isinstance(bad, PackedTernary) else decoder.decode_overwrite(bad)
    try:
        expected = bad.decode("t")
    except ExpertFileError:
        assert made is None
        return
    assert (made is None) == (nnz == 0)
    if isinstance(made, OverwriteDelta):
        assert isinstance(expected, OverwriteDelta)
        assert same_overwrite(made, expected)
    elif made is not None:
        assert isinstance(expected, SparseDelta)
        assert same(made, pack(expected, CPU, ABREAST))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_shape_that_is_not_the_streams_own_is_refused(decoder: Decoder, layout: str) -> None:
    good = laid_out(delta_of(1, (40, 70), 0.3), layout, 3)
    for shape in ((40, 60), (1, 70), (39, 70), (0, 70)):
        assert decoder.decode(replace(good, shape=shape)) is None


@pytest.mark.parametrize("below", [0.02, 0.5])
def test_the_form_is_the_callers_choice(decoder: Decoder, below: float) -> None:
    tensor = stored(sparse_delta(4, (70, 90), 0.08))
    assert same(decoder.decode(tensor, below), pack(tensor.decode("t"), CPU, ABREAST, below))
