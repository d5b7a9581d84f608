"""An expert in one buffer: nothing is lost on the way, and no bit changes unnoticed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from server.engine.kernels import dense, pack, packed_fields
from server.engine.kernels.types import BitPlanes, DenseValues, SparseRows
from server.engine.large_pages import ALIGNMENT
from server.engine.parcel import Checksum, RunningChecksum, checksum, parcel_bytes, pieces_of, wrap
from store.deltas import Delta, DenseDelta, SparseDelta

CPU = torch.device("cpu")


def sparse(shape: tuple[int, int], density: float, top: int, seed: int) -> SparseDelta:
    rng = np.random.default_rng(seed)
    places = np.flatnonzero(rng.random(shape[0] * shape[1]) < density).astype(np.int32)
    levels = (rng.integers(1, top + 1, len(places)) * rng.choice([-1, 1], len(places))).astype(np.int8)
    levels[:1] = top
    return SparseDelta(shape, places, levels, 0.25)


def deltas() -> dict[str, Delta]:
    """One of each packed form."""
    return {
        "planes": sparse((40, 70), 0.3, 1, 0),
        "digits": sparse((33, 65), 0.5, 5, 1),
        "rows": sparse((40, 70), 0.03, 1, 2),
        "levels": sparse((40, 70), 0.03, 3, 3),
        "norm": DenseDelta(np.arange(7, dtype=np.float32)),
    }


def fields_of(delta: Delta) -> tuple[int, ...]:
    if isinstance(delta, SparseDelta):
        return packed_fields(delta.shape, len(delta.indices), int(np.abs(delta.levels).max()))
    return packed_fields(delta.shape, None)


def test_what_is_wrapped_comes_out_again() -> None:
    given = deltas()
    packed = {name: pack(delta, CPU) for name, delta in given.items()}
    assert {type(delta) for delta in packed.values()} == {BitPlanes, SparseRows, DenseValues}
    size = parcel_bytes(nbytes for delta in given.values() for nbytes in fields_of(delta))
    parcel = wrap("d" * 64, size, packed.items())
    assert parcel.nbytes == size
    assert parcel.is_intact
    for name, delta in parcel.tensors().items():
        torch.testing.assert_close(dense(delta), dense(packed[name]), rtol=0, atol=0)
        assert delta.nbytes == packed[name].nbytes
        for field in dataclasses.fields(delta):
            if isinstance(value := getattr(delta, field.name), torch.Tensor):
                assert (value.data_ptr() - parcel.buffer.data_ptr()) % ALIGNMENT == 0
                assert value.untyped_storage().data_ptr() == parcel.buffer.data_ptr(), "a view, not a copy"


@pytest.mark.parametrize("wrong", [-ALIGNMENT, ALIGNMENT])
def test_a_size_that_was_announced_is_kept(wrong: int) -> None:
    packed = {"norm": pack(DenseDelta(np.arange(40, dtype=np.float32)), CPU)}
    with pytest.raises(ValueError, match="announced"):
        wrap("d" * 64, parcel_bytes([160]) + wrong, packed.items())


def test_where_the_most_was_announced_no_more_is_taken() -> None:
    packed = {"norm": pack(DenseDelta(np.arange(40, dtype=np.float32)), CPU)}
    size = parcel_bytes([160])
    with pytest.raises(ValueError, match="announced"):
        wrap("d" * 64, size - ALIGNMENT, packed.items(), exact=False)
    assert wrap("d" * 64, size + ALIGNMENT, packed.items(), exact=False).nbytes == size


@given(st.binary(min_size=8, max_size=800).map(lambda data: data[: len(data) // 8 * 8]), st.integers(min_value=0))
def test_every_flipped_bit_shows_in_both_sums(data: bytes, where: int) -> None:
    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    before = checksum(buffer)
    buffer[where % len(data)] ^= 1 << (where // len(data) % 8)
    after = checksum(buffer)
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_words_that_change_places_show(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = torch.arange(64, dtype=torch.uint8)
    swapped = torch.cat([buffer[8:16], buffer[:8], buffer[16:]])
    assert checksum(buffer)[0] == checksum(swapped)[0]
    assert checksum(buffer)[1] != checksum(swapped)[1]
    monkeypatch.setattr("server.engine.parcel._CHUNK", 1)
    assert checksum(buffer)[0] == checksum(swapped)[0]
    assert checksum(buffer)[1] != checksum(swapped)[1], "from chunk to chunk too"


def by_definition(data: bytes, chunk: int) -> Checksum:
    """The two sums in Python's integers."""
    words = np.frombuffer(data, dtype=np.int64).tolist()
    plain, weighted = sum(words), 0
    for place, word in enumerate(words):
        weighted += word * (2 * (place % chunk) + 1) * (2 * (place // chunk) + 1)
    first, second = ((total + 2**63) % 2**64 - 2**63 for total in (plain, weighted))
    return first, second


@given(st.binary(max_size=800).map(lambda data: data[: len(data) // 8 * 8]), st.data())
def test_however_many_chunks_are_summed_up_at_once_the_checksum_is_the_same(data: bytes, draw: st.DataObject) -> None:
    """A host takes one at a time, a GPU many."""
    chunk = draw.draw(st.integers(1, 12), "words of a chunk")
    in_piece, together = draw.draw(st.integers(1, 6)), draw.draw(st.integers(1, 6))
    buffer = torch.frombuffer(bytearray(data or bytes(8)), dtype=torch.uint8)[: len(data)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("server.engine.parcel._CHUNK", chunk)
        patched.setattr("server.engine.parcel._TOGETHER", in_piece)
        sums = RunningChecksum(len(data), CPU, together)
        for piece in draw.draw(st.permutations(list(pieces_of(len(data)))), "pieces"):
            sums.add(piece.start, buffer[piece])
        assert sums.result() == checksum(buffer) == by_definition(data, chunk)


@pytest.mark.parametrize("words", [0, 1, (1 << 18) - 1, 1 << 18, (5 << 18) + 3])
def test_chunks_of_their_real_size_are_summed_up_together(words: int) -> None:
    buffer = torch.randint(-(2**62), 2**62, (words,)).view(torch.uint8)
    sums = RunningChecksum(buffer.nbytes, CPU, 4)
    sums.add(0, buffer)
    assert sums.result() == checksum(buffer) == by_definition(buffer.numpy().tobytes(), 1 << 18)


@pytest.mark.gpu
def test_a_gpu_finds_the_same_checksum() -> None:
    buffer = torch.randint(-(2**62), 2**62, ((50 << 18) + 3,)).view(torch.uint8)
    assert checksum(buffer.to("cuda")) == checksum(buffer)
