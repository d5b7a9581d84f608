"""Triton kernels that add planes beside the base: y += Σ weight · x Δᵀ, for the rows of a decode step."""

from __future__ import annotations

import triton
import triton.language as tl

from server.engine.kernels.gpu_rounding import rounded


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def ternary_tile(  # type: ignore[no-untyped-def]
    plus, minus, N: tl.constexpr, J: tl.constexpr, DOT: tl.constexpr
):  # fmt: skip
    """Words `[N, J]` of both planes → `[N, 32 J]` of −2, 0 and +2 in `DOT`, its columns in the order of `folded`.

    Two bits become a number without arithmetic: the topmost bit of the exponent of bfloat16, and of float16, alone is
    2.0, the bit above is the sign. Columns c and c + 16 of a word are the halves of one register, so that a shift and
    a mask make two numbers; and the four threads that share a row of a tensor core's operand get a word each.
    """
    some = plus | minus
    even = (some & 0x55555555) | ((minus << 1) & -0x55555556)
    odd = ((some >> 1) & 0x55555555) | (minus & -0x55555556)
    shift = 14 - 2 * tl.arange(0, 8)[None, :, None]
    pairs = tl.join(even[:, None, :] << shift, odd[:, None, :] << shift) & -0x3FFF4000
    pairs = tl.permute(pairs, (0, 1, 3, 2))
    halves = tl.reshape(tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16)), (N, 32 * J))
    if tl.float16 == DOT:
        return halves.to(tl.float16, bitcast=True)
    return halves.to(tl.bfloat16, bitcast=True).to(DOT)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def folded(  # type: ignore[no-untyped-def]
    first, other, M: tl.constexpr, J: tl.constexpr
):  # fmt: skip
    """`[M, 16 J]` of columns 0 to 15 of every word and of columns 16 to 31 → `[M, 32 J]` in `ternary_tile`'s order:
    column 2c + odd + 16 half of word j stands at ((2c + odd) J + j) 2 + half."""
    both = tl.reshape(tl.join(first, other), (M, J, 8, 2, 2))
    return tl.reshape(tl.permute(both, (0, 2, 3, 1, 4)), (M, 32 * J))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def add_planes(  # type: ignore[no-untyped-def]
    y_ptr, x_ptr, chunk_ptr, term_ptr, partial_ptr, arrived_ptr, out, width,
    M: tl.constexpr, N: tl.constexpr, J: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of y: up to M batch rows of one group × N weight rows, all terms of the group one after the other, in
    float32; `gpu_bytes` has what is faster for 16 bits.

    Weights are the left operand, so that they go from registers into the product. Grid: tiles of weight rows, chunks,
    splits of the columns. With splits, whoever comes last adds up what all of them have left in `partial`, in their
    order, so that results do not depend on chance.

    Args:
        chunk_ptr, term_ptr: see `server.engine.kernels.gpu_tables`.
        partial_ptr: `[tiles, SPLITS, N, M]` float32.
        arrived_ptr: `[tiles]` int32, zeros before and after.
    """
    chunk = chunk_ptr + tl.program_id(1) * 4
    rows = tl.load(chunk).to(tl.int32) + tl.arange(0, M)
    valid = rows < tl.load(chunk + 1).to(tl.int32)
    lanes = tl.program_id(0) * N + tl.arange(0, N)
    inside = lanes < out
    words = (width + 31) // 32
    share = tl.cdiv(tl.cdiv(words, SPLITS), J) * J
    begin = tl.program_id(2) * share
    end = tl.minimum(begin + share, words)
    place = tl.arange(0, 16 * J)
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * width
    total = tl.zeros((N, M), dtype=tl.float32)
    for t in range(tl.load(chunk + 2).to(tl.int32), tl.load(chunk + 3).to(tl.int32)):
        term = term_ptr + t * 8
        power = tl.load(term + 1).to(tl.int32).to(tl.float32, bitcast=True) * 0.5
        digits = tl.load(term + 2).to(tl.int32)
        planes = tl.multiple_of(tl.load(term + 3).to(tl.pointer_type(tl.int32)), 16)
        for k in range(0, digits):
            # Padded rows are there, but whole blocks of them are not.
            first = ((lanes // 32).to(tl.int64) * digits + k) * words * 64 + lanes % 32
            sums = tl.zeros((N, M), dtype=tl.float32)
            for j in tl.range(begin, end, J, num_stages=STAGES):
                word = j + tl.arange(0, J)
                here = planes + first[:, None] + word[None, :] * 64
                mask = inside[:, None] & (word < end)[None, :]
                plus = tl.load(here, mask=mask, other=0)
                minus = tl.load(here + 32, mask=mask, other=0)
                columns = (j + place // 16) * 32 + place % 16
                x = x_rows + columns[None, :]
                low = tl.load(x, mask=valid[:, None] & (columns < width)[None, :], other=0.0)
                high = tl.load(x + 16, mask=valid[:, None] & (columns + 16 < width)[None, :], other=0.0)
                batch = tl.trans(folded(low, high, M, J))
                sums = tl.dot(ternary_tile(plus, minus, N, J, tl.float32), batch, sums, input_precision="ieee")
            total += power * sums
            power = power * 3
    is_last, total = summed(total, partial_ptr, arrived_ptr, M, N, SPLITS)
    if is_last:
        accumulate(y_ptr, rows, lanes, valid, inside, total, out)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def summed(  # type: ignore[no-untyped-def]
    total, partial_ptr, arrived_ptr, M: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """Whether the caller is the last of its tile's splits, and then the sum of what all of them have."""
    is_last = True
    if SPLITS > 1:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        cell = tl.arange(0, N)[:, None] * M + tl.arange(0, M)[None, :]
        mine = partial_ptr + tile.to(tl.int64) * (SPLITS * N * M) + cell
        tl.store(mine + tl.program_id(2) * (N * M), total)
        # Every thread's stores before the one atomic, and it before every thread's loads, which pass the L1 by.
        tl.debug_barrier()
        is_last = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
        if is_last:
            total = tl.zeros((N, M), dtype=tl.float32)
            for split in range(0, SPLITS):
                total += tl.load(mine + split * (N * M), cache_modifier=".cg")
            tl.store(arrived_ptr + tile, 0)
    return is_last, total


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def accumulate(y_ptr, rows, lanes, valid, inside, total, out):  # type: ignore[no-untyped-def]
    """y += total, `[N, M]`, rounded once."""
    target = y_ptr + rows.to(tl.int64)[:, None] * out + lanes[None, :]
    mask = valid[:, None] & inside[None, :]
    before = tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, rounded(before + tl.trans(total), y_ptr.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def absorb(y_ptr, added_ptr, size, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """y += added, and added = 0. Grid: pieces of N numbers."""
    place = tl.program_id(0) * N + tl.arange(0, N)
    mask = place < size
    added = tl.load(added_ptr + place, mask=mask, other=0.0)
    before = tl.load(y_ptr + place, mask=mask, other=0.0)
    tl.store(y_ptr + place, rounded(before.to(tl.float32) + added.to(tl.float32), y_ptr.dtype.element_ty), mask=mask)
    tl.store(added_ptr + place, tl.zeros((N,), dtype=added_ptr.dtype.element_ty), mask=mask)
