"""What the kernels of `gpu_beside` read of a batch: which rows get which deltas, and where these lie.

Experts are addressed by pointers, so that none is copied into a slot. Two tables of int64, made once for groups that
a caller keeps:

* chunk: `[chunks, 4]`: first batch row, last batch row, first term, last term (both last ones exclusive). A chunk is
  no longer than a tile, so that no block of a grid is without work.
* term: `[terms, 8]`: form (0 planes, 1 sparse, 2 dense), factor (float32 bits), digits, addresses of words (or dense
  values), order, starts, entries and levels (0 where all are 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import ReferenceType, WeakKeyDictionary, ref

import numpy as np
import torch

from server.engine.kernels.checks import check_group
from server.engine.kernels.types import (
    BitPlanes,
    DenseValues,
    Group,
    PackedDelta,
    SparseRows,
    Term,
    rows_and_columns,
)

CHUNK_FIELDS, TERM_FIELDS = 4, 8
PLANES_TILES = (8, 16, 32)
"""Batch rows of a tile of `add_bytes`, whose two halves fill a tensor core's operand, and of `add_planes`."""
SPARSE_TILES = (1, 16, 32)
"""Batch rows of a tile of `add_lists`, which takes one, and of `add_sparse`, where they cost what a full tile does."""
_SINGLY = 4
"""Batch rows of a group that are taken one by one: that many readings of its lists are faster than a tile."""

Shape = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Launch:
    """One launch: chunks of about one size that all have terms of one form.

    Attributes:
        sparse: whether they are lists, else planes.
        tile: most batch rows of a chunk.
        chunks: how many.
        one: whether each has one term only.
        levels: whether some lists have levels other than 1.
        table: the chunks, then the terms.
    """

    sparse: bool
    tile: int
    chunks: int
    one: bool
    levels: bool
    table: torch.Tensor

    @property
    def terms(self) -> torch.Tensor:
        return self.table[self.chunks * CHUNK_FIELDS :]


@dataclass(frozen=True, eq=False)
class Wide:
    """Rows whose terms are of several forms: they are summed up in float32 before they are rounded."""

    start: int
    stop: int
    launches: tuple[Launch, ...]
    dense: tuple[Term, ...]


@dataclass(frozen=True, eq=False)
class Plan:
    """How a batch is computed."""

    launches: tuple[Launch, ...]
    wide: tuple[Wide, ...]


class Plans:
    """Makes plans, and knows those of groups that it has seen; they do not keep the groups alive."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[Group, tuple[tuple[object, ...], list[ReferenceType[Group]], Plan]] = (
            WeakKeyDictionary()
        )

    def of(self, groups: Sequence[Group], rows: int, shape: Shape, device: torch.device) -> Plan:
        """The plan for a batch of so many rows.

        Raises:
            ValueError: a group is not within the rows, or a delta is not of the shape.
        """
        if not groups:
            return Plan((), ())
        key = (rows, shape, device)
        found = self._known.get(groups[0])
        if found is not None and found[0] == key and [known() for known in found[1]] == list(groups):
            return found[2]
        plan = make_plan(groups, rows, shape, device)
        self._known[groups[0]] = (key, [ref(group) for group in groups], plan)
        return plan


def make_plan(groups: Sequence[Group], rows: int, shape: Shape, device: torch.device) -> Plan:
    """See `Plans.of`."""
    pure: list[Group] = []
    wide = []
    for group in groups:
        check_group(group, rows, shape)
        if not group.terms or group.start == group.stop:
            continue
        if len({type(delta) for _, delta in group.terms}) == 1 and not _dense(group.terms):
            pure.append(group)
        else:
            own = [
                Group(0, group.stop - group.start, terms)
                for terms in (_of(group.terms, BitPlanes), _of(group.terms, SparseRows))
                if terms
            ]
            wide.append(Wide(group.start, group.stop, _launches(own, device), _dense(group.terms)))
    return Plan(_launches(pure, device), tuple(wide))


def term_fields(weight: float, delta: PackedDelta, first_row: int = 0) -> tuple[int, ...]:
    """One row of the term table.

    Args:
        first_row: a multiple of 32: addresses are those of the rows from there on. `order` keeps its values.
    """
    if isinstance(delta, DenseValues):
        offset = 4 * first_row * rows_and_columns(delta.shape)[1]
        return (2, _bits(weight), 0, delta.values.data_ptr() + offset, 0, 0, 0, 0)
    factor = _bits(weight * delta.scale)
    if isinstance(delta, BitPlanes):
        offset = 4 * (first_row // 32) * delta.words.stride(0)
        return (0, factor, delta.digits, delta.words.data_ptr() + offset, 0, 0, 0, 0)
    if not isinstance(delta, SparseRows):
        raise TypeError("lists in bytes are for CPUs")
    levels = 0 if delta.levels is None else delta.levels.data_ptr()
    lists = (delta.order.data_ptr() + 4 * first_row, delta.starts.data_ptr() + 4 * first_row)
    return (1, factor, 0, 0, *lists, delta.entries.data_ptr(), levels)


def tile_of(sparse: bool, rows: int) -> int:
    """Batch rows of the tiles that so many rows of a group are cut into."""
    if sparse and rows <= _SINGLY:
        return 1
    tiles = SPARSE_TILES if sparse else PLANES_TILES
    return next((tile for tile in tiles if rows <= tile), tiles[-1])


def _launches(groups: Sequence[Group], device: torch.device) -> tuple[Launch, ...]:
    """By form and tile; each group's terms must be of one form."""
    sorted_out: dict[tuple[bool, int], list[Group]] = {}
    for group in groups:
        sparse = isinstance(group.terms[0][1], SparseRows)
        sorted_out.setdefault((sparse, tile_of(sparse, group.stop - group.start)), []).append(group)
    return tuple(_launch(sparse, tile, some, device) for (sparse, tile), some in sorted_out.items())


def _launch(sparse: bool, tile: int, groups: Sequence[Group], device: torch.device) -> Launch:
    chunks: list[int] = []
    terms: list[int] = []
    for group in groups:
        first = len(terms) // TERM_FIELDS
        for weight, delta in group.terms:
            terms += term_fields(weight, delta)
        last = len(terms) // TERM_FIELDS
        for start in range(group.start, group.stop, tile):
            chunks += (start, min(start + tile, group.stop), first, last)
    # One copy to the device for both tables.
    table = torch.tensor(chunks + terms, dtype=torch.int64).to(device, non_blocking=True)
    one = all(len(group.terms) == 1 for group in groups)
    levels = any(isinstance(d, SparseRows) and d.levels is not None for group in groups for _, d in group.terms)
    return Launch(sparse, tile, len(chunks) // CHUNK_FIELDS, one, levels, table)


def _of(terms: Sequence[Term], form: type[PackedDelta]) -> tuple[Term, ...]:
    return tuple(term for term in terms if isinstance(term[1], form))


def _dense(terms: Sequence[Term]) -> tuple[Term, ...]:
    return _of(terms, DenseValues)


def _bits(value: float) -> int:
    """A float32's bits as a signed integer."""
    with np.errstate(over="ignore"):
        return int(np.float64(value).astype(np.float32).view(np.int32))
