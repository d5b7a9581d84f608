"""Between the deltas of an expert file and their packed forms."""

from __future__ import annotations

import numpy as np
import torch

from server.engine.kernels.byte_lists import ABREAST, IN_BYTES, byte_lists, fields_in_bytes, gather_bytes, on_device
from server.engine.kernels.types import (
    BLOCK,
    BitPlanes,
    ByteLists,
    DenseValues,
    PackedDelta,
    SparseRows,
    rows_and_columns,
)
from store.deltas import DenseDelta, SparseDelta

SPARSE_BELOW = 0.1
"""Density per digit below which a list of nonzeros is smaller than two planes (they meet at 0.11) and read faster, by
one row or by eight (they meet at 0.14 on Zen 3)."""
_MOST_COLUMNS = 1 << 15
"""Entries of `SparseRows` are 16 bits: a column and a sign."""
_ABREAST_BELOW = 0.06
"""Density per digit from which planes are read faster than lists that lie abreast, where there are lists in bytes."""


def pack(
    delta: SparseDelta | DenseDelta, device: torch.device, lanes: int = 1, lists_below: float = SPARSE_BELOW
) -> PackedDelta:
    """A decoded delta in the form that mixed mode reads fastest, on the device.

    Vectors (norms, biases) and dense deltas are kept as float32; the others by density.

    Args:
        lanes: how many lists lie abreast, see `SparseRows`; `IN_BYTES` makes `ByteLists`, or where these would take
            more than `most_vectors` what is read fastest without them.
        lists_below: see `packed_fields`.
    """
    if not isinstance(delta, SparseDelta):
        return DenseValues(torch.from_numpy(delta.values).to(device))
    top = int(np.abs(delta.levels.astype(np.int16)).max(initial=1))
    form = form_of(delta.shape, len(delta.indices), top, lists_below, lanes)
    if form is DenseValues:
        values = np.zeros(delta.shape, np.float32)
        values.reshape(-1)[delta.indices] = delta.levels * np.float32(delta.scale)
        return DenseValues(torch.from_numpy(values).to(device))
    if form is ByteLists:
        in_bytes = byte_lists(delta, top, device)
        if in_bytes is not None:
            return in_bytes
        form = form_of(delta.shape, len(delta.indices), top, below_beside(lists_below))
    if form is SparseRows:
        return _sparse_rows(delta, top, device, min(lanes, ABREAST))
    return _bit_planes(delta, top, device)


def packed_bytes(shape: tuple[int, ...], nnz: int | None, top_level: int = 1) -> int:
    """Exactly what `pack` will take of the device's memory; arguments as for `packed_fields`."""
    return sum(packed_fields(shape, nnz, top_level))


def packed_fields(
    shape: tuple[int, ...], nnz: int | None, top_level: int = 1, lists_below: float = SPARSE_BELOW, lanes: int = 1
) -> tuple[int, ...]:
    """Bytes of each of the tensors that `pack` will make of one delta, in the order of their fields; the most that they
    may take, where it makes `ByteLists`.

    Args:
        shape: of the tensor.
        nnz: its nonzeros; None for a dense delta.
        top_level: the largest magnitude among the levels; 1 for ternary deltas.
        lists_below: density per digit below which it is lists, else planes; half of it where these are `ByteLists` with
            levels, which take two bytes per nonzero.
    """
    rows, columns = rows_and_columns(shape)
    form = DenseValues if nnz is None else form_of(shape, nnz, top_level, lists_below, lanes)
    if nnz is None or form is DenseValues:
        return (4 * rows * columns,)
    if form is ByteLists:
        beside = packed_fields(shape, nnz, top_level, below_beside(lists_below))
        return max(fields_in_bytes(rows, nnz, top_level), beside, key=sum)
    if form is SparseRows:
        return (4 * rows, 4 * (rows + 1), 2 * nnz, *(() if top_level == 1 else (nnz,)))
    return (8 * _blocks(rows) * BLOCK * _blocks(columns) * _digits(top_level),)


def gather_rows(delta: PackedDelta, rows: torch.Tensor) -> torch.Tensor:
    """Rows of a delta, dense: what an embedding adds for these tokens.

    Args:
        rows: `[n]` int64 on the delta's device, below the number of rows.

    Returns:
        `[n, columns]` float32.
    """
    count, columns = rows_and_columns(delta.shape)
    if isinstance(delta, DenseValues):
        return delta.values.view(count, columns)[rows]
    if isinstance(delta, BitPlanes):
        return _decode_words(delta.words[rows // BLOCK, :, :, :, rows % BLOCK], delta.scale, columns)
    if isinstance(delta, ByteLists):
        return gather_bytes(delta, rows)
    block = (rows // BLOCK * BLOCK)[:, None] + torch.arange(BLOCK, device=delta.device)
    block.clamp_(max=count - 1)
    lists = block.gather(1, (delta.order[block] == rows[:, None]).to(torch.uint8).argmax(1, keepdim=True)).squeeze(1)
    owner, chosen = places(delta, lists)
    entries = delta.entries[chosen].long() & 0xFFFF
    values = (1 - 2 * (entries & 1)).float() * delta.scale
    if delta.levels is not None:
        values *= delta.levels[chosen]
    dense = torch.zeros(len(rows), columns, device=delta.device)
    dense[owner, entries >> 1] = values
    return dense


def places(delta: SparseRows, lists: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of some lists has an entry, and where it is: both `[entries]` int64, list by list, of each in its order.

    Args:
        lists: `[n]` int64, in the order of `delta.order`.
    """
    counts = (delta.starts[1:] - delta.starts[:-1]).long()
    own = counts[lists]
    owner = torch.repeat_interleave(torch.arange(len(lists), device=delta.device), own)
    rank = torch.arange(len(owner), device=delta.device) - torch.repeat_interleave(own.cumsum(0) - own, own)
    first = lists // delta.lanes * delta.lanes
    beside = first[:, None] + torch.arange(delta.lanes, device=delta.device)
    sizes = counts[beside.clamp(max=len(counts) - 1)].masked_fill_(beside >= len(counts), 0)
    before = torch.minimum(sizes[owner], rank[:, None]).sum(1)  # entries of lower rank
    return owner, delta.starts[first[owner]].long() + before + (lists - first)[owner]


def dense(delta: PackedDelta) -> torch.Tensor:
    """The whole delta as float32, in its own shape."""
    if isinstance(delta, DenseValues):
        return delta.values
    rows, _ = rows_and_columns(delta.shape)
    return gather_rows(delta, torch.arange(rows, device=delta.device)).view(delta.shape)


def form_of(
    shape: tuple[int, ...], nnz: int, top_level: int, lists_below: float = SPARSE_BELOW, lanes: int = 1
) -> type[PackedDelta]:
    """What `pack` makes of a delta with so many nonzeros, the largest of that magnitude, where `ByteLists` are as small
    as they should be; `lists_below` and `lanes` as there."""
    rows, columns = rows_and_columns(shape)
    if len(shape) < 2:
        return DenseValues
    most = lists_below * _digits(top_level) * rows * columns
    if lanes == IN_BYTES and nnz < (most if top_level == 1 else most / 2):
        return ByteLists
    if lanes != IN_BYTES and nnz < most and columns <= _MOST_COLUMNS:
        return SparseRows
    return BitPlanes


def below_beside(lists_below: float) -> float:
    """The same density for lists that cannot be in bytes, where `lists_below` is that of those that can."""
    return min(lists_below, _ABREAST_BELOW)


def _sparse_rows(delta: SparseDelta, top: int, device: torch.device, lanes: int) -> SparseRows:
    rows, columns = rows_and_columns(delta.shape)
    owner = (delta.indices // columns).astype(np.int64)
    counts = np.bincount(owner, minlength=rows)
    order = np.lexsort((-counts, np.arange(rows) // BLOCK))
    starts = np.concatenate([[0], np.cumsum(counts[order])])
    natural = np.concatenate([[0], np.cumsum(counts)])[:-1]
    rank = np.arange(len(owner)) - np.repeat(starts[:-1], counts[order])
    chosen = rank + np.repeat(natural[order], counts[order])
    if lanes > 1:
        lists = np.repeat(np.arange(rows), counts[order])
        chosen = chosen[np.lexsort((lists, rank, lists // lanes))]
    entries = 2 * (delta.indices - owner * columns) + (delta.levels < 0)
    levels = np.abs(delta.levels.astype(np.int16)).astype(np.uint8)

    return SparseRows(
        delta.shape,
        delta.scale,
        order=on_device(order.astype(np.int32), device),
        starts=on_device(starts.astype(np.int32), device),
        entries=on_device(entries[chosen].astype(np.uint16).view(np.int16), device),
        levels=None if top == 1 else on_device(levels[chosen], device),
        lanes=lanes,
    )


def _bit_planes(delta: SparseDelta, top: int, device: torch.device) -> BitPlanes:
    rows, columns = rows_and_columns(delta.shape)
    digits, row_blocks, column_blocks = _digits(top), _blocks(rows), _blocks(columns)
    words = np.empty((row_blocks, digits, column_blocks, 2, BLOCK), np.int32)
    trits, left = delta.levels, delta.levels
    values = np.zeros((row_blocks * BLOCK, column_blocks * BLOCK), np.int8)
    places = delta.indices.astype(np.int64)
    if values.shape[1] != columns:
        places += places // columns * (values.shape[1] - columns)
    wide = torch.from_numpy(places)
    for digit in range(digits):
        if digits > 1:
            left = left.astype(np.int16)
            trits = (left + 1) % 3 - 1
            left = (left - trits) // 3
        torch.from_numpy(values.reshape(-1)).scatter_(0, wide, torch.from_numpy(trits.astype(np.int8, copy=False)))
        for sign, which in enumerate((values > 0, values < 0)):
            packed = np.packbits(which.reshape(-1), bitorder="little").view("<i4")
            words[:, digit, :, sign, :] = packed.reshape(row_blocks, BLOCK, column_blocks).transpose(0, 2, 1)
    return BitPlanes(delta.shape, delta.scale, torch.from_numpy(words).to(device))


def _decode_words(words: torch.Tensor, scale: float, columns: int) -> torch.Tensor:
    """`[n, digits, columns/32, 2]` int32 → `[n, columns]` float32."""
    bits = words.unsqueeze(-1) >> torch.arange(BLOCK, dtype=torch.int32, device=words.device) & 1
    trits = (bits[:, :, :, 0] - bits[:, :, :, 1]).flatten(2)
    powers = 3 ** torch.arange(trits.shape[1], dtype=torch.int32, device=words.device)
    return (trits * powers[:, None]).sum(1, dtype=torch.int32)[:, :columns].float() * scale


def _digits(top_level: int) -> int:
    """Balanced ternary digits that reach `top_level`: 1, 4, 13, 40, 121, 364."""
    digits = 1
    while (3**digits - 1) // 2 < top_level:
        digits += 1
    return digits


def _blocks(size: int) -> int:
    return -(-size // BLOCK)
