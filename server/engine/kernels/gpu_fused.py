"""Triton kernels that multiply with weights and deltas at once: y = x (W + Σ weight · Δ)ᵀ, for prompts."""

from __future__ import annotations

import triton
import triton.language as tl

from server.engine.kernels.gpu_beside import folded, ternary_tile
from server.engine.kernels.gpu_rounding import rounded


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator, unused-ignore]
def fold_rows(  # type: ignore[no-untyped-def]
    folded_ptr, x_ptr, rows, width, M: tl.constexpr, J: tl.constexpr
):  # fmt: skip
    """x → `[rows, width up to a multiple of 32 J]`, each piece of 32 J columns in `ternary_tile`'s order, zeros beyond.

    Grid: pieces of columns, tiles of M rows.
    """
    row = tl.program_id(1) * M + tl.arange(0, M)
    place = tl.arange(0, 16 * J)
    columns = (tl.program_id(0) * J + place // 16) * 32 + place % 16
    x = x_ptr + row.to(tl.int64)[:, None] * width + columns[None, :]
    valid = (row < rows)[:, None]
    low = tl.load(x, mask=valid & (columns < width)[None, :], other=0.0)
    high = tl.load(x + 16, mask=valid & (columns + 16 < width)[None, :], other=0.0)
    pieces = tl.num_programs(0).to(tl.int64) * (32 * J)
    target = folded_ptr + row[:, None] * pieces + (tl.program_id(0) * (32 * J) + tl.arange(0, 32 * J))[None, :]
    tl.store(target, folded(low, high, M, J), mask=valid)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator, unused-ignore]
def fused_product(  # type: ignore[no-untyped-def]
    y_ptr, folded_ptr, weight_ptr, bias_ptr, term_ptr, rows, out, width,
    M: tl.constexpr, N: tl.constexpr, J: tl.constexpr, BAND: tl.constexpr,
    BIAS: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of y, M batch rows × N weight rows: each tile of W is read once for all of them, moved as in merged mode
    (a sum in float32, one rounding), and goes from registers into the tensor cores. No product is computed twice.

    Grid: all tiles, in bands of BAND tiles of weight rows, so that what runs at one time shares operands in L2.

    Args:
        folded_ptr: x as `fold_rows` makes it.
        term_ptr: one row of the term table: planes of one digit.
    """
    tiles_m, tiles_n = tl.cdiv(rows, M), tl.cdiv(out, N)
    band = tl.program_id(0) // (BAND * tiles_m)
    within = tl.program_id(0) % (BAND * tiles_m)
    size = tl.minimum(tiles_n - band * BAND, BAND)
    batch = (within // size) * M + tl.arange(0, M)
    lanes = (band * BAND + within % size) * N + tl.arange(0, N)
    valid, inside = batch < rows, lanes < out
    words = (width + 31) // 32
    pieces = tl.cdiv(words, J) * (32 * J)
    place = tl.arange(0, 16 * J)
    x_rows = folded_ptr + batch.to(tl.int64)[None, :] * pieces + tl.arange(0, 32 * J)[:, None]
    weights = weight_ptr + lanes.to(tl.int64)[:, None] * width
    factor = tl.load(term_ptr + 1).to(tl.int32).to(tl.float32, bitcast=True) * 0.5
    planes = tl.multiple_of(tl.load(term_ptr + 3).to(tl.pointer_type(tl.int32)), 16)
    planes += ((lanes // 32).to(tl.int64) * words * 64 + lanes % 32)[:, None]
    sums = tl.zeros((N, M), dtype=tl.float32)
    for j in tl.range(0, words, J, num_stages=STAGES):
        x = tl.load(x_rows + j * 32, mask=valid[None, :], other=0.0)
        columns = (j + place // 16) * 32 + place % 16
        here = weights + columns[None, :]
        low = tl.load(here, mask=inside[:, None] & (columns < width)[None, :], other=0.0)
        high = tl.load(here + 16, mask=inside[:, None] & (columns + 16 < width)[None, :], other=0.0)
        weight = folded(low, high, N, J).to(tl.float32)
        word = j + tl.arange(0, J)
        there = inside[:, None] & (word < words)[None, :]
        tile = planes + word[None, :] * 64
        plus = tl.load(tile, mask=there, other=0)
        minus = tl.load(tile + 32, mask=there, other=0)
        # Exact, fused or not: one factor is a power of two.
        weight += factor * ternary_tile(plus, minus, N, J, DOT).to(tl.float32)
        moved = rounded(weight, weight_ptr.dtype.element_ty).to(DOT)
        sums = tl.dot(moved, x.to(DOT), sums, input_precision="ieee")
    if BIAS:
        sums += tl.load(bias_ptr + lanes, mask=inside, other=0.0).to(tl.float32)[:, None]
    target = y_ptr + batch.to(tl.int64)[:, None] * out + lanes[None, :]
    tl.store(target, rounded(tl.trans(sums), y_ptr.dtype.element_ty), mask=valid[:, None] & inside[None, :])
