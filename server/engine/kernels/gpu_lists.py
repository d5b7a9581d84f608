"""Triton kernels that add lists of nonzeros beside the base: y += Σ weight · x Δᵀ, for the rows of a decode step."""

from __future__ import annotations

import triton
import triton.language as tl

from server.engine.kernels.gpu_rounding import rounded


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def stage_rows(  # type: ignore[no-untyped-def]
    staged_ptr, x_ptr, chunk_ptr, width, M: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """x → `[chunks, width, M]`, the rows of each chunk side by side, zeros where it has fewer than M."""
    chunk = chunk_ptr + tl.program_id(1) * 4
    rows = tl.load(chunk) + tl.arange(0, M)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    mask = (rows < tl.load(chunk + 1))[:, None] & inside[None, :]
    x = tl.load(x_ptr + rows[:, None] * width + columns[None, :], mask=mask, other=0.0)
    staged = staged_ptr + tl.program_id(1).to(tl.int64) * width * M
    tl.store(staged + columns[:, None] * M + tl.arange(0, M)[None, :], tl.trans(x), mask=inside[:, None])


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _listed(order, lanes, out, ONE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Lists of the lanes, and the weight rows that they are for.

    Where every group has ONE term, a tile is of lists in their own order, which are of about one length; else each row
    looks up its list in each term's order.
    """
    inside = lanes < out
    if ONE:
        return lanes, tl.load(order + lanes, mask=inside, other=0)
    candidates = (lanes // 32 * 32)[:, None] + tl.arange(0, 32)[None, :]
    owners = tl.load(order + candidates, mask=candidates < out, other=-1)
    return tl.sum(tl.where(owners == lanes[:, None], candidates, 0), axis=1), lanes


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def add_lists(  # type: ignore[no-untyped-def]
    y_ptr, x_ptr, chunk_ptr, term_ptr, out, width,
    W: tl.constexpr, N: tl.constexpr, E: tl.constexpr, ONE: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """One tile of y: the one batch row of a chunk × N weight rows. E entries of each row at a time, side by side.

    The batch row waits in shared memory, as what entries of one row hit are far apart in it: each of a warp's reads is
    of another line of a cache, but mostly of another bank. Grid: tiles of weight rows (N divides 32, or 32 divides N),
    chunks.

    Args:
        W: a power of two, no less than `width`.
        LEVELS: whether there are levels other than 1.
    """
    chunk = chunk_ptr + tl.program_id(1) * 4
    row = tl.load(chunk)
    if row < tl.load(chunk + 1):
        lanes = tl.program_id(0) * N + tl.arange(0, N)
        inside = lanes < out
        targets = lanes
        columns = tl.arange(0, W)
        x = tl.load(x_ptr + row * width + columns, mask=columns < width, other=0.0)
        if x_ptr.dtype.element_ty == tl.bfloat16:
            x = x.to(tl.int16, bitcast=True)
        # Added up along the entries at the very end: until then nobody waits for anybody.
        sums = tl.zeros((N, E), dtype=tl.float32)
        for t in range(tl.load(chunk + 2).to(tl.int32), tl.load(chunk + 3).to(tl.int32)):
            term = term_ptr + t * 8
            factor = tl.load(term + 1).to(tl.int32).to(tl.float32, bitcast=True)
            starts = tl.load(term + 5).to(tl.pointer_type(tl.int32))
            entries = tl.load(term + 6).to(tl.pointer_type(tl.int16))
            levels = tl.load(term + 7)
            lists, targets = _listed(tl.load(term + 4).to(tl.pointer_type(tl.int32)), lanes, out, ONE)
            start = tl.load(starts + lists, mask=inside, other=0)
            count = tl.load(starts + lists + 1, mask=inside, other=0) - start
            own = tl.zeros((N, E), dtype=tl.float32)
            for i in range(0, tl.max(count, axis=0), E):
                number = i + tl.arange(0, E)[None, :]
                present = number < count[:, None]
                place = start[:, None] + number
                entry = tl.load(entries + place, mask=present, other=0).to(tl.int32) & 0xFFFF
                found = tl.reshape(tl.gather(x, tl.reshape(entry >> 1, (N * E,)), 0), (N, E))
                if x_ptr.dtype.element_ty == tl.bfloat16:  # bfloat16 is the upper half of float32
                    value = ((found.to(tl.int32) << 16) ^ (entry << 31)).to(tl.float32, bitcast=True)
                else:
                    value = tl.where((entry & 1) == 1, -found.to(tl.float32), found.to(tl.float32))
                if LEVELS:  # noqa: SIM102 (decided at compile time, the other one in the loop)
                    if levels != 0:
                        level = tl.load(levels.to(tl.pointer_type(tl.uint8)) + place, mask=present, other=0)
                        value = value * level.to(tl.float32)
                own += tl.where(present, value, 0.0)
            sums += own * factor
        total = tl.sum(sums, axis=1)
        target = y_ptr + row * out + targets
        before = tl.load(target, mask=inside, other=0.0).to(tl.float32)
        tl.store(target, rounded(before + total, y_ptr.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def add_sparse(  # type: ignore[no-untyped-def]
    y_ptr, staged_ptr, chunk_ptr, term_ptr, out, width,
    M: tl.constexpr, N: tl.constexpr, E: tl.constexpr, ONE: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """One tile of y: up to M batch rows of one group × N weight rows. E entries of each row at a time, side by side.

    What an entry is multiplied with is one piece of what `stage_rows` made of x. Grid: tiles of weight rows, chunks.
    """
    chunk = chunk_ptr + tl.program_id(1) * 4
    rows = tl.load(chunk).to(tl.int32) + tl.arange(0, M)
    valid = rows < tl.load(chunk + 1).to(tl.int32)
    lanes = tl.program_id(0) * N + tl.arange(0, N)
    inside = lanes < out
    targets = lanes
    x_rows = staged_ptr + tl.program_id(1).to(tl.int64) * width * M + tl.arange(0, M)[None, None, :]
    sums = tl.zeros((N, E, M), dtype=tl.float32)
    for t in range(tl.load(chunk + 2).to(tl.int32), tl.load(chunk + 3).to(tl.int32)):
        term = term_ptr + t * 8
        factor = tl.load(term + 1).to(tl.int32).to(tl.float32, bitcast=True)
        starts = tl.load(term + 5).to(tl.pointer_type(tl.int32))
        entries = tl.load(term + 6).to(tl.pointer_type(tl.int16))
        levels = tl.load(term + 7)
        lists, targets = _listed(tl.load(term + 4).to(tl.pointer_type(tl.int32)), lanes, out, ONE)
        start = tl.load(starts + lists, mask=inside, other=0)
        count = tl.load(starts + lists + 1, mask=inside, other=0) - start
        for i in range(0, tl.max(count, axis=0), E):
            number = i + tl.arange(0, E)[None, :]
            present = number < count[:, None]
            place = start[:, None] + number
            entry = tl.load(entries + place, mask=present, other=0).to(tl.int32) & 0xFFFF
            value = tl.where((entry & 1) == 1, -factor, factor)
            if LEVELS:  # noqa: SIM102 (decided at compile time, the other one in the loop)
                if levels != 0:
                    level = tl.load(levels.to(tl.pointer_type(tl.uint8)) + place, mask=present, other=0)
                    value = value * level.to(tl.float32)
            column = (entry >> 1)[:, :, None]
            x = tl.load(x_rows + column * M, mask=present[:, :, None], other=0.0)
            sums += value[:, :, None] * x.to(tl.float32)
    total = tl.sum(sums, axis=1)
    target = y_ptr + rows.to(tl.int64)[None, :] * out + targets[:, None]
    mask = inside[:, None] & valid[None, :]
    before = tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, rounded(before + total, y_ptr.dtype.element_ty), mask=mask)
