from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store.encodings import BITMAP, RICE, Encoded, as_indices, decode, encode_smallest
from store.errors import ExpertFileError
from tests.store.builders import random_positions


def round_trip(indices: np.ndarray, levels: np.ndarray, numel: int) -> Encoded:
    encoded = encode_smallest(as_indices(indices, numel), levels, numel)
    found, signs = decode(encoded, nnz=len(indices), numel=numel, tensor="t")
    assert found.dtype == np.int32
    assert signs.dtype == np.int8
    np.testing.assert_array_equal(found, indices)
    np.testing.assert_array_equal(signs, levels)
    return encoded


def textbook_decode(encoded: Encoded, nnz: int, numel: int) -> tuple[list[int], list[int]]:
    """docs/expert-file.md, section 3, read bit by bit."""
    bits = [byte >> place & 1 for byte in encoded.payload for place in range(8)]
    signs = bits[len(bits) - (nnz + 7) // 8 * 8 :]
    levels = [1 if bit else -1 for bit in signs[:nnz]]
    if encoded.name == BITMAP:
        return [index for index in range(numel) if bits[index]], levels
    k = encoded.params["k"]
    remainders = bits[len(bits) - len(signs) - (nnz * k + 7) // 8 * 8 :]
    indices, place, index = [], 0, -1
    for number in range(nnz):
        quotient = bits.index(1, place) - place
        place += quotient + 1
        remainder = sum(remainders[number * k + bit] << bit for bit in range(k))
        index += (quotient << k) + remainder + 1
        indices.append(index)
    return indices, levels


@settings(max_examples=100, deadline=None)
@given(numel=st.integers(0, 1500), density=st.floats(0, 1), seed=st.integers(0, 2**32 - 1))
def test_the_layout_is_the_documented_one(numel: int, density: float, seed: int) -> None:
    indices, levels = random_positions(np.random.default_rng(seed), numel, density)
    encoded = encode_smallest(as_indices(indices, numel), levels, numel)
    assert textbook_decode(encoded, len(indices), numel) == (indices.tolist(), levels.tolist())


@settings(max_examples=150, deadline=None)
@given(data=st.data(), numel=st.integers(0, 3000), density=st.floats(0, 1), seed=st.integers(0, 2**32 - 1))
def test_any_tensor_survives_the_round_trip(data: st.DataObject, numel: int, density: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    indices, levels = random_positions(rng, numel, density)
    if data.draw(st.booleans()):
        levels = np.full(len(levels), data.draw(st.sampled_from([-1, 1])), dtype=np.int8)
    round_trip(indices, levels, numel)


@settings(max_examples=100, deadline=None)
@given(numel=st.integers(1, 5_000_000), picks=st.sets(st.floats(0, 1, exclude_max=True), max_size=20))
def test_few_far_nonzeros_survive(numel: int, picks: set[float]) -> None:
    indices = np.array(sorted({int(pick * numel) for pick in picks}), dtype=np.int64)
    round_trip(indices, np.ones(len(indices), dtype=np.int8), numel)


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 64, 1001])
def test_empty_full_and_odd_sizes(numel: int) -> None:
    none = np.empty(0, dtype=np.int64)
    assert round_trip(none, none.astype(np.int8), numel).name == BITMAP
    everything = np.arange(numel)
    round_trip(everything, np.where(everything % 3, 1, -1).astype(np.int8), numel)
    if numel:
        round_trip(np.array([0]), np.array([-1], dtype=np.int8), numel)
        round_trip(np.array([numel - 1]), np.array([1], dtype=np.int8), numel)


@pytest.mark.parametrize("density", [0.001, 0.003, 0.01, 0.03, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.382, 0.42, 0.5])
def test_size_is_within_five_percent_of_the_entropy(density: float) -> None:
    numel = 3_000_001
    indices, levels = random_positions(np.random.default_rng(1), numel, density)
    encoded = round_trip(indices, levels, numel)
    d = len(indices) / numel
    bound = numel * (-d * math.log2(d) - (1 - d) * math.log2(1 - d) + d)
    assert 0.99 < 8 * len(encoded.payload) / bound < 1.05


def test_positions_beyond_int32_come_back_as_int64() -> None:
    numel = 2**31 + 5
    indices = np.array([3, 2**31 + 4], dtype=np.int64)
    encoded = encode_smallest(indices, np.array([1, -1], dtype=np.int8), numel)
    found, _ = decode(encoded, nnz=2, numel=numel, tensor="t")
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, indices)


@pytest.mark.parametrize(
    ("indices", "levels", "numel"),
    [([1, 1], [1, 1], 9), ([2, 1], [1, 1], 9), ([-1], [1], 9), ([9], [1], 9), ([1], [0], 9), ([1], [1, 1], 9)],
)
def test_the_encoder_refuses_what_is_no_sparse_tensor(indices: list[int], levels: list[int], numel: int) -> None:
    with pytest.raises(ValueError, match=r"must|differ"):
        encode_smallest(np.array(indices, dtype=np.int32), np.array(levels, dtype=np.int8), numel)


RICE_SAMPLE = encode_smallest(np.array([5, 40, 41, 90], np.int32), np.array([1, -1, 1, 1], np.int8), 200)
BITMAP_SAMPLE = encode_smallest(np.arange(0, 19, 2, dtype=np.int32), np.ones(10, np.int8), 19)


@pytest.mark.parametrize(
    ("encoded", "nnz", "numel", "fault"),
    [
        (RICE_SAMPLE, 5, 200, "ones|hold"),
        (RICE_SAMPLE, 3, 200, "ones|hold"),
        (RICE_SAMPLE, 4, 90, "beyond"),
        (RICE_SAMPLE, 201, 200, "claims"),
        (RICE_SAMPLE, -1, 200, "claims"),
        (Encoded(RICE, {"k": 0}, RICE_SAMPLE.payload), 4, 200, "parameter"),
        (Encoded(RICE, {"k": 25}, RICE_SAMPLE.payload), 4, 200, "parameter"),
        (Encoded(RICE, {}, RICE_SAMPLE.payload), 4, 200, "unknown encoding"),
        (Encoded("huffman", {}, RICE_SAMPLE.payload), 4, 200, "unknown encoding"),
        (Encoded(RICE, RICE_SAMPLE.params, b""), 4, 200, "hold"),
        (Encoded(RICE, RICE_SAMPLE.params, RICE_SAMPLE.payload[:-1] + b"\xff"), 4, 200, "padding"),
        (Encoded(RICE, {"k": 1}, b"\x0f\x00\x00\x0f"), 4, 200, "after the last gap"),
        (BITMAP_SAMPLE, 9, 19, "ones"),
        (BITMAP_SAMPLE, 11, 19, "ones"),
        (BITMAP_SAMPLE, 10, 27, "needs"),
        (Encoded(BITMAP, {}, BITMAP_SAMPLE.payload + b"\0"), 10, 19, "needs"),
        (Encoded(BITMAP, {}, b"\xff" * 3 + b"\xff\x03"), 10, 19, "padding"),
        (Encoded(BITMAP, {}, b""), 0, 8, "needs"),
    ],
)
def test_the_decoder_names_the_tensor_and_the_fault(encoded: Encoded, nnz: int, numel: int, fault: str) -> None:
    with pytest.raises(ExpertFileError, match=fault) as caught:
        decode(encoded, nnz=nnz, numel=numel, tensor="layers.7.weight")
    assert caught.value.param == "layers.7.weight"
    assert "layers.7.weight" in caught.value.message


@settings(max_examples=300, deadline=None)
@given(
    payload=st.binary(max_size=60), k=st.integers(-2, 30), nnz=st.integers(0, 200), numel=st.integers(0, 400), rice=...
)
def test_random_bytes_decode_to_a_valid_tensor_or_an_error(
    payload: bytes, k: int, nnz: int, numel: int, rice: bool
) -> None:
    encoded = Encoded(RICE, {"k": k}, payload) if rice else Encoded(BITMAP, {}, payload)
    try:
        indices, levels = decode(encoded, nnz=nnz, numel=numel, tensor="t")
    except ExpertFileError:
        return
    assert len(indices) == len(levels) == nnz
    assert nnz == 0 or (indices[0] >= 0 and indices[-1] < numel and bool((np.diff(indices) > 0).all()))
    assert set(levels.tolist()) <= {-1, 1}
