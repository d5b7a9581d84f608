"""Lists of nonzeros in bytes, from deltas and back; see `ByteLists`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from server.engine.kernels.types import BLOCK, PIECE, ByteLists, piece_width, rows_and_columns
from store.deltas import SparseDelta

ABREAST, IN_BYTES = 16, 64
"""Lanes of the two kinds of lists that CPUs read: see `SparseRows` and `ByteLists`."""
MOST_COLUMNS = 256 * PIECE
"""Of a tensor: a byte names a piece."""


def fields_in_bytes(rows: int, nnz: int, top_level: int) -> tuple[int, ...]:
    """Most bytes of each of the tensors of `ByteLists`, in the order of their fields."""
    vectors, blocks = most_vectors(rows, nnz), -(-rows // BLOCK)
    return (BLOCK * blocks, 4 * (2 * blocks + 1), vectors, *(IN_BYTES * vectors,) * (1 if top_level == 1 else 2))


def most_vectors(rows: int, nnz: int) -> int:
    """Most vectors of `ByteLists`: half as many bytes again as `SparseRows` would take. Real task vectors take a fifth
    more where one weight in fifty is a nonzero, and no more from one in twenty on."""
    return -(-(3 * nnz + 12 * rows) // IN_BYTES)


def on_device(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """A NumPy array as a tensor there."""
    return torch.from_numpy(array).to(device)


def byte_lists(delta: SparseDelta, top: int, device: torch.device) -> ByteLists | None:
    """A delta's lists in bytes; None where they would take more than `most_vectors`, or a column's piece no byte."""
    rows, columns = rows_and_columns(delta.shape)
    width, blocks = piece_width(columns), -(-rows // BLOCK)
    pieces = -(-columns // width)
    if columns > MOST_COLUMNS:
        return None
    owner = (delta.indices // columns).astype(np.int64)
    column = delta.indices - owner * columns
    run = owner * pieces + column // width
    counts = np.bincount(run, minlength=rows * pieces)
    rank = np.arange(len(run)) - (np.cumsum(counts) - counts)[run]
    per_row = np.zeros((blocks * BLOCK, pieces), np.int64)
    per_row[:rows] = counts.reshape(rows, pieces)
    order = np.lexsort((-per_row.sum(1), np.arange(blocks * BLOCK) // BLOCK))  # those beyond the last row come last
    needed = -(-per_row[order].reshape(2 * blocks, ABREAST, pieces).max(1) // 4)
    total = int(needed.sum())
    if total > most_vectors(rows, len(run)):
        return None
    list_of = np.empty_like(order)
    list_of[order] = np.arange(len(order))
    first = np.cumsum(needed.reshape(-1)) - needed.reshape(-1)
    own = list_of[owner]
    vector = first[own // ABREAST * pieces + column // width] + rank // 4
    at = (vector * ABREAST + own % ABREAST) * 4 + rank % 4
    entries = np.full(total * IN_BYTES, PIECE, np.uint8)
    entries[at] = column % width + 128 * (delta.levels < 0)
    levels = np.zeros(total * IN_BYTES if top > 1 else 0, np.uint8)
    if top > 1:
        levels[at] = np.abs(delta.levels.astype(np.int16))

    return ByteLists(
        delta.shape,
        delta.scale,
        places=on_device((list_of % BLOCK).astype(np.uint8), device),
        starts=on_device(np.concatenate([[0], np.cumsum(needed.sum(1))]).astype(np.int32), device),
        pieces=on_device(np.repeat(np.tile(np.arange(pieces, dtype=np.uint8), 2 * blocks), needed.reshape(-1)), device),
        entries=on_device(entries.reshape(-1, ABREAST, 4), device),
        levels=on_device(levels.reshape(-1, ABREAST, 4), device) if top > 1 else None,
    )


def byte_places(delta: ByteLists, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which of some rows has an entry, its column, and its signed level, float32: each `[entries]`, row by row.

    Args:
        rows: `[n]` int64 on the delta's device.
    """
    lists = rows // BLOCK * BLOCK + delta.places[rows].long()
    group = lists // ABREAST
    counts = (delta.starts[group + 1] - delta.starts[group]).long()
    owner = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), counts)
    vector = torch.arange(len(owner), device=rows.device) - (counts.cumsum(0) - counts)[owner]
    vector += delta.starts[group].long()[owner]
    lane = (lists % ABREAST)[owner]
    entries = delta.entries[vector, lane].long()
    columns = delta.pieces[vector].long()[:, None] * delta.width + (entries & PIECE)
    levels = (1 - 2 * (entries >> 7)).float()
    if delta.levels is not None:
        levels *= delta.levels[vector, lane]
    there = (entries & PIECE) != PIECE
    return owner[:, None].expand_as(entries)[there], columns[there], levels[there]


def gather_bytes(delta: ByteLists, rows: torch.Tensor) -> torch.Tensor:
    """See `gather_rows`."""
    owner, columns, levels = byte_places(delta, rows)
    dense = torch.zeros(len(rows), rows_and_columns(delta.shape)[1], device=delta.device)
    dense[owner, columns] = levels * delta.scale
    return dense
