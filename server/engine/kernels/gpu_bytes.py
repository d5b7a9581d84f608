"""Triton kernels that add planes beside the base by the tensor cores' integers: y += Σ weight · x Δᵀ.

Two bits of a plane become a byte in one shift and one mask, four at a time: half of what numbers of 16 bits take, and
it is this arithmetic, not memory, that a batch of many experts waits for. So the batch is made integers too: a row x is
s · (256 · large + small) with `large` and `small` of eight bits, 16 bits below the largest of its numbers; products are
summed up exactly, in 32 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from server.engine.kernels.gpu_beside import accumulate, summed
from server.engine.kernels.gpu_rounding import INTERPRETED

_LARGEST = tl.constexpr(32512.0)
"""127 · 256: what the largest number of a row becomes."""
_LEAST = tl.constexpr(1e-30)
"""A row whose numbers are all smaller is one of zeros."""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def split_rows(  # type: ignore[no-untyped-def]
    bytes_ptr, scale_ptr, x_ptr, width, padded, J: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """x → `[rows, 2, padded]` int8, large and small, each piece of 32 J columns in `ternary_bytes`'s order, zeros
    beyond; and `[rows]` float32, the s of each row, not finite where the row is not.

    Grid: pieces of COLUMNS columns, a multiple of 32 J; rows.

    Args:
        padded: the width up to a multiple of COLUMNS.
    """
    row = tl.program_id(1)
    x_row = x_ptr + row.to(tl.int64) * width
    most = tl.zeros((COLUMNS,), dtype=tl.float32)
    spoilt = tl.zeros((COLUMNS,), dtype=tl.float32)
    for c in range(0, width, COLUMNS):
        columns = c + tl.arange(0, COLUMNS)
        x = tl.load(x_row + columns, mask=columns < width, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.abs(x))
        spoilt += x * 0.0
    largest = tl.max(most, axis=0)
    is_zero = largest < _LEAST
    place = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    within = place % (32 * J)
    columns = place - within + within % (4 * J) // 4 * 32 + within % 4 * 8 + within // (4 * J)
    x = tl.load(x_row + columns, mask=columns < width, other=0.0).to(tl.float32)
    x = tl.where(is_zero, 0.0, x * (_LARGEST / tl.where(is_zero, 1.0, largest)))
    whole = tl.floor(tl.where(x == x, x, 0.0) + 0.5).to(tl.int32)
    large = (whole + 128) >> 8
    target = bytes_ptr + row.to(tl.int64) * (2 * padded) + place
    tl.store(target, large.to(tl.int8))
    tl.store(target + padded, (whole - large * 256).to(tl.int8))
    if tl.program_id(0) == 0:
        tl.store(scale_ptr + row, tl.where(is_zero, 0.0, largest / _LARGEST) + tl.sum(spoilt, axis=0))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def ternary_bytes(plus, minus, N: tl.constexpr, J: tl.constexpr):  # type: ignore[no-untyped-def]
    """Words `[N, J]` of both planes → `[N, 32 J]` int8 of −64, 0 and +64: column 8b + t of word j stands at
    (t J + j) 4 + b, so that the four threads that share a row of a tensor core's operand get a word each."""
    some = plus | minus
    even = (some & 0x55555555) | ((minus << 1) & -0x55555556)
    odd = ((some >> 1) & 0x55555555) | (minus & -0x55555556)
    shift = 6 - 2 * tl.arange(0, 4)[None, :, None]
    fours = tl.join(even[:, None, :] << shift, odd[:, None, :] << shift)
    if INTERPRETED:
        fours &= -0x3F3F3F40
    else:
        # The compiler must not see what is masked: it would then put every byte together by itself.
        fours = tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0xC0C0C0C0;", "=r,r", [fours], dtype=tl.int32, is_pure=True, pack=1
        )
    fours = tl.reshape(tl.permute(fours, (0, 1, 3, 2)), (N, 8, J))
    ends = tl.join(fours.to(tl.int8), (fours >> 16).to(tl.int8))
    return tl.reshape(tl.join(ends, tl.join((fours >> 8).to(tl.int8), (fours >> 24).to(tl.int8))), (N, 32 * J))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def add_bytes(  # type: ignore[no-untyped-def]
    y_ptr, bytes_ptr, scale_ptr, chunk_ptr, term_ptr, partial_ptr, arrived_ptr, out, width, padded,
    M: tl.constexpr, N: tl.constexpr, J: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of y, as `add_planes` does it: up to M batch rows of one group × N weight rows.

    Args:
        bytes_ptr, scale_ptr: x as `split_rows` makes it with the same J.
    """
    chunk = chunk_ptr + tl.program_id(1) * 4
    first_row, stop_row = tl.load(chunk).to(tl.int32), tl.load(chunk + 1).to(tl.int32)
    lanes = tl.program_id(0) * N + tl.arange(0, N)
    inside = lanes < out
    words = (width + 31) // 32
    share = tl.cdiv(tl.cdiv(words, SPLITS), J) * J
    begin = tl.program_id(2) * share
    end = tl.minimum(begin + share, words)
    halves = 2 * first_row + tl.arange(0, 2 * M)
    there = (halves < 2 * stop_row)[:, None]
    x_rows = bytes_ptr + halves.to(tl.int64)[:, None] * padded + tl.arange(0, 32 * J)[None, :]
    total = tl.zeros((N, M), dtype=tl.float32)
    for t in range(tl.load(chunk + 2).to(tl.int32), tl.load(chunk + 3).to(tl.int32)):
        term = term_ptr + t * 8
        power = tl.load(term + 1).to(tl.int32).to(tl.float32, bitcast=True) * 0.015625
        digits = tl.load(term + 2).to(tl.int32)
        planes = tl.multiple_of(tl.load(term + 3).to(tl.pointer_type(tl.int32)), 16)
        for k in range(0, digits):
            # Padded rows are there, but whole blocks of them are not.
            first = ((lanes // 32).to(tl.int64) * digits + k) * words * 64 + lanes % 32
            sums = tl.zeros((N, 2 * M), dtype=tl.int32)
            for j in tl.range(begin, end, J, num_stages=STAGES):
                word = j + tl.arange(0, J)
                here = planes + first[:, None] + word[None, :] * 64
                mask = inside[:, None] & (word < end)[None, :]
                plus = tl.load(here, mask=mask, other=0)
                minus = tl.load(here + 32, mask=mask, other=0)
                x = tl.load(x_rows + j * 32, mask=there, other=0)
                sums = tl.dot(ternary_bytes(plus, minus, N, J), tl.trans(x), sums, out_dtype=tl.int32)
            large, small = tl.split(tl.reshape(sums, (N, M, 2)))
            total += power * (large.to(tl.float32) * 256.0 + small.to(tl.float32))
            power = power * 3
    rows = first_row + tl.arange(0, M)
    valid = rows < stop_row
    total *= tl.load(scale_ptr + rows, mask=valid, other=0.0)[None, :]
    is_last, total = summed(total, partial_ptr, arrived_ptr, M, N, SPLITS)
    if is_last:
        accumulate(y_ptr, rows, lanes, valid, inside, total, out)
