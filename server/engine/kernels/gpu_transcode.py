"""From the bytes of an expert file to packed deltas on the device: what crosses the bus is the stored encoding.

A stream is read by all threads at once: what comes before a word is known from a running sum of the ones in the words
before it (`store.positions` says why Rice codes can be decoded that way). The reference is `pack(tensor.decode(...))`,
which the result equals bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from server.engine.kernels.packing import form_of
from server.engine.kernels.types import BLOCK, BitPlanes, DenseValues, PackedDelta, SparseRows, rows_and_columns
from store.bits import bytes_for, fail
from store.packed import PackedLevels, PackedTernary
from store.positions import BITMAP, MAX_K, MIN_K, RICE, RICE_ZEROS

_TILE = 1024
"""Elements of a block where each is one of a list."""
_WORDS = 32
"""Words of a block where each is taken apart bit by bit."""
_PLANE_WORDS = 4
"""Words of a row of planes that a block makes."""
_MOST = 2**30
"""Elements of a tensor, exclusive: positions are int32, and so is what a wrong stream makes of them."""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def popcount(word):  # type: ignore[no-untyped-def]
    """Ones of uint32 words, as int32."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word = word + (word >> 8)
    return ((word + (word >> 16)) & 0x3F).to(tl.int32)


@triton.jit(do_not_specialize=["words"])  # type: ignore[untyped-decorator, unused-ignore]
def count_ones(words_ptr, counts_ptr, words, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Ones of each of a stream's int32 words."""
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = place < words
    word = tl.load(words_ptr + place, mask=mask, other=0).to(tl.uint32, bitcast=True)
    tl.store(counts_ptr + place, popcount(word), mask=mask)


@triton.jit(do_not_specialize=["words", "count"])  # type: ignore[untyped-decorator, unused-ignore]
def find_ones(  # type: ignore[no-untyped-def]
    words_ptr, upto_ptr, found_ptr, words, count, WORDS: tl.constexpr
):  # fmt: skip
    """Places of the ones of a stream, ascending; `upto` counts those up to the end of each word."""
    place = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    mask = place < words
    word = tl.load(words_ptr + place, mask=mask, other=0).to(tl.uint32, bitcast=True)
    before = tl.load(upto_ptr + place, mask=mask, other=0) - popcount(word)
    bit = tl.arange(0, 32).to(tl.uint32)[None, :]
    one = (tl.full((1, 1), 1, tl.uint32) << bit).to(tl.uint32)
    rank = before[:, None] + popcount(word[:, None] & (one - 1))
    is_set = ((word[:, None] & one) != 0) & (rank < count)
    tl.store(found_ptr + rank, place[:, None] * 32 + bit.to(tl.int32), mask=is_set)


@triton.jit(do_not_specialize=["count", "k"])  # type: ignore[untyped-decorator, unused-ignore]
def unpack_bits(words_ptr, values_ptr, count, k, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Values of k ≤ 24 bits each out of a stream."""
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = place < count
    start = place.to(tl.int64) * k
    here = words_ptr + (start >> 5)
    low = tl.load(here, mask=mask, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
    # The stream is followed by a word of zeros at least.
    high = tl.load(here + 1, mask=mask, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
    value = ((low | (high << 32)) >> (start & 31).to(tl.uint64)).to(tl.int32)
    tl.store(values_ptr + place, value & ((1 << k) - 1), mask=mask)


@triton.jit(do_not_specialize=["count", "k"])  # type: ignore[untyped-decorator, unused-ignore]
def rice_indices(found_ptr, sums_ptr, count, k, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """In place: terminators of the unary stream → positions, given the running sums of the remainders."""
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = place < count
    found = tl.load(found_ptr + place, mask=mask, other=0)
    sums = tl.load(sums_ptr + place, mask=mask, other=0)
    tl.store(found_ptr + place, ((found - place) << k) + sums + place, mask=mask)


@triton.jit(do_not_specialize=["count", "numel"])  # type: ignore[untyped-decorator, unused-ignore]
def set_ones(words_ptr, indices_ptr, count, numel, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Bits of a stream of zeros, set where the indices say."""
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    index = tl.load(indices_ptr + place, mask=place < count, other=-1)
    tl.atomic_or(words_ptr + (index >> 5), 1 << (index & 31), mask=(index >= 0) & (index < numel), sem="relaxed")


@triton.jit(do_not_specialize=["rows", "columns", "mask_words"])  # type: ignore[untyped-decorator, unused-ignore]
def make_planes(  # type: ignore[no-untyped-def]
    planes_ptr, mask_ptr, upto_ptr, signs_ptr, rows, columns, mask_words, C: tl.constexpr
):  # fmt: skip
    """A bitmap of a matrix and the signs of its ones → the words of `BitPlanes`. Grid: C words, blocks of 32 rows."""
    row = tl.program_id(1) * 32 + tl.arange(0, 32)[:, None]
    block = tl.program_id(0) * C + tl.arange(0, C)[None, :]
    there = (row < rows) & (block * 32 < columns)
    start = row.to(tl.int64) * columns + block * 32
    place = start >> 5
    shift = (start & 31).to(tl.uint32)
    low = tl.load(mask_ptr + place, mask=there, other=0).to(tl.uint32, bitcast=True)
    high = tl.load(mask_ptr + place + 1, mask=there & (place + 1 < mask_words), other=0).to(tl.uint32, bitcast=True)
    ahead = (tl.full((1, 1), 1, tl.uint32) << shift) - 1
    first = tl.load(upto_ptr + place, mask=there, other=0) - popcount(low & (0xFFFFFFFF - ahead))
    word = ((low.to(tl.uint64) | (high.to(tl.uint64) << 32)) >> shift.to(tl.uint64)).to(tl.uint32)
    left = tl.minimum(columns - block * 32, 32)
    word = tl.where(there, word & ((tl.full((1, 1), 1, tl.uint64) << left.to(tl.uint64)) - 1).to(tl.uint32), 0)
    one = (tl.full((1, 1, 1), 1, tl.uint32) << tl.arange(0, 32).to(tl.uint32)[None, None, :]).to(tl.uint32)
    rank = first[:, :, None] + popcount(word[:, :, None] & (one - 1))
    is_set = (word[:, :, None] & one) != 0
    sign = tl.load(signs_ptr + (rank >> 5), mask=is_set, other=0) >> (rank & 31)
    plus = tl.sum(tl.where(is_set & ((sign & 1) == 1), one.to(tl.int32, bitcast=True), 0), axis=2)
    minus = word.to(tl.int32, bitcast=True) ^ plus
    words = (columns + 31) // 32
    target = planes_ptr + (tl.program_id(1).to(tl.int64) * words + block) * 64 + tl.arange(0, 32)[:, None]
    tl.store(target, plus, mask=block < words)
    tl.store(target + 32, minus, mask=block < words)


VARIANTS: tuple[tuple[Any, dict[str, int]], ...] = (
    *((kernel, {"TILE": _TILE}) for kernel in (count_ones, unpack_bits, rice_indices, set_ones)),
    (find_ones, {"WORDS": _WORDS}),
    (make_planes, {"C": _PLANE_WORDS}),
)
"""Each of the kernels above, and its constants."""


def can_transcode(tensor: PackedTernary) -> bool:
    """Whether a device decodes this: levels other than ±1 come in a tree of streams, and groups from elsewhere only."""
    known = tensor.encoded.name in (BITMAP, RICE, RICE_ZEROS)
    return known and not isinstance(tensor, PackedLevels) and tensor.numel < _MOST


def transcode(name: str, tensor: PackedTernary, device: torch.device) -> PackedDelta:
    """`pack` of what a tensor decodes to, made on the device.

    Args:
        name: the tensor's, for errors.
        tensor: of those that `can_transcode`. Of its bytes all is checked that memory or the order of indices depends
            on, and not that padding is zero.

    Raises:
        ExpertFileError: they are not what the counts promise.
    """
    nnz, numel, shape = tensor.nnz, tensor.numel, tensor.shape
    rows, columns = rows_and_columns(shape)
    form = form_of(shape, nnz, 1)
    marks, signs = _divided(name, tensor)
    indices: torch.Tensor | None = None
    if tensor.encoded.name == BITMAP:
        mask, ones = _on_device([marks, signs], device)
    else:
        k = tensor.encoded.params["k"]
        count = nnz if tensor.encoded.name == RICE else numel - nnz
        unary = len(marks) - bytes_for(count * k)
        quotients, remainders, ones = _on_device([marks[:unary], marks[unary:], signs], device)
        indices = _rice(name, quotients, remainders, count, k, numel)
        if tensor.encoded.name == RICE and form is not BitPlanes:
            return _from_indices(tensor, indices, ones)
        mask = torch.zeros(bytes_for(numel) // 4 + 2, dtype=torch.int32, device=device)
        if count:
            set_ones[(triton.cdiv(count, _TILE),)](mask, indices, count, numel, TILE=_TILE)
        if tensor.encoded.name == RICE_ZEROS:
            mask.bitwise_not_()
            mask[numel // 32] &= (1 << numel % 32) - 1
            mask[numel // 32 + 1 :] = 0
    if form is BitPlanes:
        return BitPlanes(shape, tensor.scale, _planes(name, mask, ones, nnz, rows, columns))
    indices = _find(name, mask, nnz)
    _check_ascending(name, indices, numel)
    return _from_indices(tensor, indices, ones)


def _divided(name: str, tensor: PackedTernary) -> tuple[np.ndarray, np.ndarray]:
    """The streams of the positions, and that of the signs, of lengths that the counts permit."""
    nnz, numel = tensor.nnz, tensor.numel
    payload = np.frombuffer(tensor.payload, np.uint8)
    place = len(payload) - bytes_for(nnz)
    fits = 0 < nnz <= numel and place >= 0
    if fits and tensor.encoded.name == BITMAP:
        fits = not tensor.encoded.params and place == bytes_for(numel)
    elif fits:
        k = tensor.encoded.params.get("k", 0)
        count = nnz if tensor.encoded.name == RICE else numel - nnz
        most = bytes_for(count + (numel >> k)) if count else 0
        fits = MIN_K <= k <= MAX_K and bytes_for(count) <= place - bytes_for(count * k) <= most
    if not fits:
        fail(name, f"has {len(payload)} payload bytes, which cannot hold {nnz} of {numel} elements")
    return payload[:place], payload[place:]


def _on_device(streams: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Streams as int32 words, a word of zeros after each, in one copy."""
    sizes = [4 * (len(stream) // 4 + 2) for stream in streams]
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    buffer = np.zeros(sum(sizes), np.uint8)
    for stream, start in zip(streams, starts, strict=True):
        buffer[start : start + len(stream)] = stream
    words = torch.from_numpy(buffer.view(np.int32)).to(device, non_blocking=True)
    return [words[start // 4 : (start + size) // 4] for start, size in zip(starts, sizes, strict=True)]


def _ones_upto(name: str, words: torch.Tensor, count: int) -> torch.Tensor:
    """Ones up to the end of each word."""
    counts = torch.empty_like(words)
    count_ones[(triton.cdiv(len(words), _TILE),)](words, counts, len(words), TILE=_TILE)
    upto = counts.cumsum(0, dtype=torch.int32)
    if int(upto[-1]) != count:
        fail(name, f"has a stream with {int(upto[-1])} ones instead of {count}")
    return upto


def _find(name: str, words: torch.Tensor, count: int) -> torch.Tensor:
    found = torch.zeros(count, dtype=torch.int32, device=words.device)
    upto = _ones_upto(name, words, count)
    find_ones[(triton.cdiv(len(words), _WORDS),)](words, upto, found, len(words), count, WORDS=_WORDS)
    return found


def _rice(name: str, quotients: torch.Tensor, remainders: torch.Tensor, count: int, k: int, numel: int) -> torch.Tensor:
    found = _find(name, quotients, count)
    if count:
        values = torch.empty_like(found)
        grid = (triton.cdiv(count, _TILE),)
        unpack_bits[grid](remainders, values, count, k, TILE=_TILE)
        rice_indices[grid](found, values.cumsum(0, dtype=torch.int32), count, k, TILE=_TILE)
        _check_ascending(name, found, numel)
    return found


def _check_ascending(name: str, indices: torch.Tensor, numel: int) -> None:
    """No step reaches 2³¹, so that sums which ran over are found out as well."""
    ascending = (indices[1:] > indices[:-1]).all() & (indices[0] >= 0) & (indices[-1] < numel)
    if not bool(ascending):
        fail(name, f"has indices that do not ascend below its {numel} elements")


def _planes(name: str, mask: torch.Tensor, signs: torch.Tensor, nnz: int, rows: int, columns: int) -> torch.Tensor:
    upto = _ones_upto(name, mask, nnz)
    blocks, words = -(-rows // BLOCK), -(-columns // BLOCK)
    planes = torch.empty(blocks, 1, words, 2, BLOCK, dtype=torch.int32, device=mask.device)
    grid = (triton.cdiv(words, _PLANE_WORDS), blocks)
    make_planes[grid](planes, mask, upto, signs, rows, columns, len(mask), C=_PLANE_WORDS)
    return planes


def _from_indices(tensor: PackedTernary, indices: torch.Tensor, signs: torch.Tensor) -> SparseRows | DenseValues:
    """Lists, or the few values of a vector, by torch's own means."""
    device = indices.device
    number = torch.arange(len(indices), device=device)
    negative = 1 - ((signs[number >> 5] >> (number & 31)) & 1)
    if form_of(tensor.shape, tensor.nnz, 1) is DenseValues:
        values = torch.zeros(tensor.numel, device=device)
        values[indices.long()] = (1 - 2 * negative).float() * tensor.scale
        return DenseValues(values.view(tensor.shape))
    rows, columns = rows_and_columns(tensor.shape)
    edges = torch.arange(rows + 1, device=device) * columns
    natural = torch.searchsorted(indices.long(), edges)
    counts = natural.diff()
    padded = torch.full((-(-rows // BLOCK) * BLOCK,), -1, dtype=counts.dtype, device=device)
    padded[:rows] = counts
    order = padded.view(-1, BLOCK).argsort(dim=1, descending=True, stable=True)
    order = (order + torch.arange(len(order), device=device)[:, None] * BLOCK).view(-1)[:rows]
    starts = torch.zeros(rows + 1, dtype=torch.int64, device=device)
    torch.cumsum(counts[order], 0, out=starts[1:])
    owner = indices.long() // columns
    moved = torch.empty_like(starts[:-1])
    moved[order] = starts[:-1]
    entries = torch.empty(len(indices), dtype=torch.int16, device=device)
    entries[moved[owner] + number - natural[owner]] = (2 * (indices - owner * columns) + negative).to(torch.int16)
    return SparseRows(tensor.shape, tensor.scale, order.int(), starts.int(), entries, None)
