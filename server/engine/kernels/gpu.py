"""The kernels in Triton, for GPUs. With TRITON_INTERPRET=1 in the environment they run, very slowly, on a CPU."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from server.engine.kernels.reference import ReferenceKernels
from server.engine.kernels.types import BitPlanes, DenseValues, Group, LoadedTerm, SparseRows, rows_and_columns

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FEW = 16
"""Batch rows of a tile for decoding: the least that a tensor core takes."""
MANY = 64
"""Batch rows of a tile for prompts: a tile of planes is decoded once for all of them."""
_WIDE = 64
"""Weight rows of a tile."""
_CHUNK_FIELDS = 4
_TERM_FIELDS = 8


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _add_linear(  # type: ignore[no-untyped-def]
    y_ptr, x_ptr, chunk_ptr, term_ptr, out, width,
    M: tl.constexpr, N: tl.constexpr, DOT: tl.constexpr, PLANES: tl.constexpr, SPARSE: tl.constexpr,
):  # fmt: skip
    """One tile of y: up to M batch rows of one group × N weight rows, all terms of the group one after the other.

    chunk: `[chunks, 4]` int64: first batch row, last batch row, first term, last term (exclusive).
    term: `[terms, 8]` int64: form (0 planes, 1 sparse), factor (float32 bits), digits, addresses of words, order,
        starts, entries and levels (0 where all are 1).
    """
    chunk = chunk_ptr + tl.program_id(0) * 4
    rows = tl.load(chunk) + tl.arange(0, M)
    valid = rows < tl.load(chunk + 1)
    lanes = tl.program_id(1) * N + tl.arange(0, N)
    inside = lanes < out
    words = (width + 31) // 32
    total = tl.zeros((M, N), dtype=tl.float32)
    for t in range(tl.load(chunk + 2), tl.load(chunk + 3)):
        term = term_ptr + t * 8
        form = tl.load(term)
        factor = tl.load(term + 1).to(tl.int32).to(tl.float32, bitcast=True)
        if PLANES:  # noqa: SIM102 (decided at compile time, the other one in the loop)
            if form == 0:
                digits = tl.load(term + 2)
                planes = tl.load(term + 3).to(tl.pointer_type(tl.int32))
                bit = tl.arange(0, 32)
                power = factor
                for k in range(0, digits):
                    # Padded rows are there, but whole blocks of them are not.
                    first = ((lanes // 32).to(tl.int64) * digits + k) * words * 64 + lanes % 32
                    for j in range(0, words):
                        plus = tl.load(planes + first + j * 64, mask=inside, other=0)
                        minus = tl.load(planes + first + j * 64 + 32, mask=inside, other=0)
                        digit = ((plus[None, :] >> bit[:, None]) & 1) - ((minus[None, :] >> bit[:, None]) & 1)
                        columns = j * 32 + bit
                        mask = valid[:, None] & (columns < width)[None, :]
                        x = tl.load(x_ptr + rows[:, None] * width + columns[None, :], mask=mask, other=0.0)
                        # By way of float32: the interpreter does not compute in bfloat16.
                        x = x.to(tl.float32).to(DOT)
                        total += power * tl.dot(x, digit.to(tl.float32).to(DOT), input_precision="ieee")
                    power = power * 3
        if SPARSE:  # noqa: SIM102
            if form == 1:
                order = tl.load(term + 4).to(tl.pointer_type(tl.int32))
                starts = tl.load(term + 5).to(tl.pointer_type(tl.int32))
                entries = tl.load(term + 6).to(tl.pointer_type(tl.int16))
                levels = tl.load(term + 7)
                # Which list of its block is this row's?
                block = lanes // 32 * 32
                list_of = tl.zeros((N,), dtype=tl.int32)
                for i in range(0, 32):
                    candidate = tl.load(order + block + i, mask=block + i < out, other=-1)
                    list_of = tl.where(candidate == lanes, block + i, list_of)
                start = tl.load(starts + list_of, mask=inside, other=0)
                count = tl.load(starts + list_of + 1, mask=inside, other=0) - start
                for i in range(0, tl.max(count, axis=0)):
                    present = i < count
                    entry = tl.load(entries + start + i, mask=present, other=0).to(tl.int32) & 0xFFFF
                    value = tl.where((entry & 1) == 1, -factor, factor)
                    if levels != 0:
                        level = tl.load(levels.to(tl.pointer_type(tl.uint8)) + start + i, mask=present, other=0)
                        value = value * level.to(tl.float32)
                    mask = valid[:, None] & present[None, :]
                    x = tl.load(x_ptr + rows[:, None] * width + (entry >> 1)[None, :], mask=mask, other=0.0)
                    total += tl.where(present[None, :], x.to(tl.float32) * value[None, :], 0.0)
    target = y_ptr + rows[:, None] * out + lanes[None, :]
    mask = valid[:, None] & inside[None, :]
    before = tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, (before + total).to(y_ptr.dtype.element_ty), mask=mask)


class TritonKernels:
    """A tile's planes become numbers in registers, just before the tensor cores take them.

    Groups are cut into chunks of a tile's rows, so that no block of the grid is without work. Experts are addressed
    by pointers in a table: no slot, no copy. Dense deltas are left to torch.
    """

    name = "triton"

    def __init__(self) -> None:
        self._plain = ReferenceKernels()

    def add_linear(self, y: torch.Tensor, x: torch.Tensor, groups: Sequence[Group]) -> None:
        rows, out = y.shape
        width = x.shape[1]
        if not (y.is_contiguous() and x.is_contiguous() and x.dtype is y.dtype and x.shape[0] == rows):
            raise ValueError("y and x must be contiguous, of one dtype, and have the same rows")
        tile = MANY if any(group.stop - group.start > FEW for group in groups) else FEW
        chunks, terms, forms = _tables(groups, rows, (out, width), tile)
        if chunks and terms:
            # One copy to the device for both tables.
            table = torch.tensor(chunks + terms, dtype=torch.int64).to(y.device, non_blocking=True)
            count = len(chunks) // _CHUNK_FIELDS
            dot = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(x.dtype, tl.float32)
            _add_linear[(count, triton.cdiv(out, _WIDE))](
                y, x, table, table[len(chunks) :], out, width,
                M=tile, N=_WIDE, DOT=tl.float32 if INTERPRETED else dot, PLANES=0 in forms, SPARSE=1 in forms,
            )  # fmt: skip
        for group in groups:
            dense = tuple(term for term in group.terms if isinstance(term[1], DenseValues))
            if dense:
                self._plain.add_linear(y, x, [Group(group.start, group.stop, dense)])

    def merge(self, out: torch.Tensor, pristine: torch.Tensor, terms: Sequence[LoadedTerm]) -> None:
        self._plain.merge(out, pristine, terms)


def _tables(
    groups: Sequence[Group], rows: int, shape: tuple[int, int], tile: int
) -> tuple[list[int], list[int], set[int]]:
    """The chunks and the terms as the kernel reads them, and the forms that occur."""
    chunks: list[int] = []
    terms: list[int] = []
    forms: set[int] = set()
    for group in groups:
        if not 0 <= group.start <= group.stop <= rows:
            raise ValueError(f"the group [{group.start}, {group.stop}) is not within {rows} rows")
        first = len(terms) // _TERM_FIELDS
        for weight, delta in group.terms:
            if rows_and_columns(delta.shape) != shape:
                raise ValueError(f"a delta of shape {delta.shape} cannot be applied to {shape[1]} → {shape[0]}")
            if isinstance(delta, BitPlanes):
                terms += (0, _bits(weight * delta.scale), delta.digits, delta.words.data_ptr(), 0, 0, 0, 0)
                forms.add(0)
            elif isinstance(delta, SparseRows):
                levels = 0 if delta.levels is None else delta.levels.data_ptr()
                lists = (delta.order.data_ptr(), delta.starts.data_ptr(), delta.entries.data_ptr())
                terms += (1, _bits(weight * delta.scale), 0, 0, *lists, levels)
                forms.add(1)
        last = len(terms) // _TERM_FIELDS
        if last > first:
            for number in range(math.ceil((group.stop - group.start) / tile)):
                start = group.start + number * tile
                chunks += (start, min(start + tile, group.stop), first, last)
    return chunks, terms, forms


def _bits(value: float) -> int:
    """A float32's bits as a signed integer."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])
