"""Triton kernels that fold deltas into weights at the speed of memory: out = pristine + Σ weight · Δ, rounded once.

They must be launched without fused multiply-adds, which round differently from the reference.
"""

from __future__ import annotations

import triton
import triton.language as tl

from server.engine.kernels.gpu_rounding import rounded


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def planes_tile(  # type: ignore[no-untyped-def]
    term, rows, block, width, inside, C: tl.constexpr, R: tl.constexpr, MANY: tl.constexpr
):  # fmt: skip
    """A term of planes as `[R, 32 C]` float32, weighted: the rows `rows`, and the columns of the words `block`.

    Args:
        term: the row of the term table.
        inside: `[R]`, which of the rows there are.
        MANY: whether there may be several digits; only then do numbers come from a multiplication.
    """
    factor = tl.load(term + 1).to(tl.int32).to(tl.float32, bitcast=True)
    digits = tl.load(term + 2).to(tl.int32)
    planes = tl.multiple_of(tl.load(term + 3).to(tl.pointer_type(tl.int32)), 16)
    words = (width + 31) // 32
    bit = tl.arange(0, 32)[None, None, :]
    mask = inside[:, None] & (block < words)[None, :]
    here = planes + ((rows // 32).to(tl.int64) * digits * words * 64 + rows % 32)[:, None] + block[None, :] * 64
    if MANY:
        level = tl.zeros((R, C, 32), dtype=tl.int32)
        power = 1
        for k in range(0, digits):
            plus = tl.load(here + k * words * 64, mask=mask, other=0)[:, :, None]
            minus = tl.load(here + k * words * 64 + 32, mask=mask, other=0)[:, :, None]
            level += power * (((plus >> bit) & 1) - ((minus >> bit) & 1))
            power = power * 3
        delta = level.to(tl.float32) * factor
    else:
        plus = tl.load(here, mask=mask, other=0)[:, :, None]
        minus = tl.load(here + 32, mask=mask, other=0)[:, :, None]
        delta = tl.where(((plus >> bit) & 1) != 0, factor, tl.where(((minus >> bit) & 1) != 0, -factor, 0.0))
    return tl.reshape(delta, (R, 32 * C))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def merge_tiles(  # type: ignore[no-untyped-def]
    out_ptr, pristine_ptr, term_ptr, terms, rows, width,
    R: tl.constexpr, C: tl.constexpr, PLANES: tl.constexpr, DENSE: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """Terms that are planes or dense, all in one pass. Grid: tiles of 32 C columns, tiles of R rows (R divides 32)."""
    row = tl.program_id(1) * R + tl.arange(0, R)
    block = tl.program_id(0) * C + tl.arange(0, C)
    inside = row < rows
    columns = tl.program_id(0) * (32 * C) + tl.arange(0, 32 * C)
    cell = row.to(tl.int64)[:, None] * width + columns[None, :]
    mask = inside[:, None] & (columns < width)[None, :]
    before = tl.load(pristine_ptr + cell, mask=mask, other=0.0).to(tl.float32)
    total = tl.zeros((R, 32 * C), dtype=tl.float32)
    for t in range(0, terms):
        term = term_ptr + t * 8
        form = tl.load(term)
        if PLANES:  # noqa: SIM102 (decided at compile time, the other one in the loop)
            if form == 0:
                total += planes_tile(term, row, block, width, inside, C, R, MANY)
        if DENSE:  # noqa: SIM102
            if form == 2:
                values = tl.load(term + 3).to(tl.pointer_type(tl.float32))
                weight = tl.load(term + 1).to(tl.int32).to(tl.float32, bitcast=True)
                total += tl.load(values + cell, mask=mask, other=0.0) * weight
    tl.store(out_ptr + cell, rounded(before + total, out_ptr.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def merge_lists(  # type: ignore[no-untyped-def]
    out_ptr, pristine_ptr, term_ptr, first_row, rows, width,
    L: tl.constexpr, COLUMNS: tl.constexpr, E: tl.constexpr, COPY: tl.constexpr,
):  # fmt: skip
    """One sparse term: L lists with their rows. Copies the rows, then moves what the lists name, while it is in the
    cache: memory is read and written once. Without COPY, `out` and `pristine` are one.

    Grid: tiles of L lists (L divides 32).

    Args:
        first_row: what `order` calls the first of the rows.
    """
    lists = tl.program_id(0) * L + tl.arange(0, L)
    inside = lists < rows
    factor = tl.load(term_ptr + 1).to(tl.int32).to(tl.float32, bitcast=True)
    order = tl.load(term_ptr + 4).to(tl.pointer_type(tl.int32))
    starts = tl.load(term_ptr + 5).to(tl.pointer_type(tl.int32))
    entries = tl.load(term_ptr + 6).to(tl.pointer_type(tl.int16))
    levels = tl.load(term_ptr + 7)
    row = (tl.load(order + lists, mask=inside, other=0) - first_row).to(tl.int64) * width
    start = tl.load(starts + lists, mask=inside, other=0)
    count = tl.load(starts + lists + 1, mask=inside, other=0) - start
    if COPY:
        for c in range(0, width, COLUMNS):
            columns = c + tl.arange(0, COLUMNS)
            cell = row[:, None] + columns[None, :]
            mask = inside[:, None] & (columns < width)[None, :]
            tl.store(out_ptr + cell, tl.load(pristine_ptr + cell, mask=mask), mask=mask)
        # Another thread of the block may have copied what this one is about to move.
        tl.debug_barrier()
    for i in range(0, tl.max(count, axis=0), E):
        number = i + tl.arange(0, E)[None, :]
        present = number < count[:, None]
        place = start[:, None] + number
        entry = tl.load(entries + place, mask=present, other=0).to(tl.int32) & 0xFFFF
        value = tl.where((entry & 1) == 1, -factor, factor)
        if levels != 0:
            level = tl.load(levels.to(tl.pointer_type(tl.uint8)) + place, mask=present, other=0)
            value = value * level.to(tl.float32)
        cell = row[:, None] + (entry >> 1)
        before = tl.load(pristine_ptr + cell, mask=present, other=0.0).to(tl.float32)
        tl.store(out_ptr + cell, rounded(before + value, out_ptr.dtype.element_ty), mask=present)
