"""Weights moved by deltas on a GPU: for merged mode, and a slab at a time for products of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
import triton

from server.engine.kernels import gpu_variants
from server.engine.kernels.gpu_cuda import CudaKernels
from server.engine.kernels.gpu_merge import merge_lists, merge_tiles
from server.engine.kernels.gpu_tables import term_fields
from server.engine.kernels.types import BLOCK, BitPlanes, DenseValues, LoadedDelta, SparseRows, Term

SLAB_BYTES = 16 << 20
"""Of what is put together before it is rounded, or multiplied with: it stays in the L2 cache."""


class Mover:
    """All of its tensors are contiguous matrices on one device."""

    def __init__(self, cuda: CudaKernels | None) -> None:
        """Args:
        cuda: what takes a delta alone, if not Triton.
        """
        self._cuda = cuda
        self._terms: WeakKeyDictionary[LoadedDelta, dict[int, tuple[float, torch.Tensor]]] = WeakKeyDictionary()
        """Of each delta, by first row, its table at the last weight: clients choose from hundreds of thousands."""

    def multiply(
        self, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, terms: Sequence[Term]
    ) -> None:
        """y = x (W + Σ weight · Δ)ᵀ + bias: weights are moved a slab at a time, which torch then multiplies with out of
        the cache."""
        for first, slab in slabs(weight):
            moved = torch.empty_like(slab)
            self.merge(moved, slab, terms, first)
            rows = slice(first, first + len(slab))
            if bias is None:
                torch.mm(x, moved.T, out=y[:, rows])
            else:
                torch.addmm(bias[rows], x, moved.T, out=y[:, rows])

    def merge(self, out: torch.Tensor, pristine: torch.Tensor, terms: Sequence[Term], first_row: int = 0) -> None:
        """out = pristine + Σ weight · Δ, of some rows of the deltas, a multiple of 32 from the first."""
        lists = [isinstance(delta, SparseRows) for _, delta in terms]
        if not any(lists):
            self._move_tiles(out, pristine, terms, first_row)
        elif len(terms) == 1:
            self._move_lists(out, pristine, terms, first_row)
        else:
            for first, slab in slabs(pristine, itemsize=4):
                total = torch.zeros(slab.shape, dtype=torch.float32, device=slab.device)
                for term, is_lists in zip(terms, lists, strict=True):
                    move = self._move_lists if is_lists else self._move_tiles
                    move(total, total, [term], first_row + first)
                out[first : first + len(slab)] = total.add_(slab)

    def _move_tiles(self, out: torch.Tensor, pristine: torch.Tensor, terms: Sequence[Term], first_row: int) -> None:
        rows, width = out.shape
        digits = [delta.digits for _, delta in terms if isinstance(delta, BitPlanes)]
        if self._cuda is not None and len(terms) == 1 and digits == [1] and out.data_ptr() != pristine.data_ptr():
            self._cuda.merge_planes(out, pristine, self.table(terms, first_row))
            return
        dense = any(isinstance(delta, DenseValues) for _, delta in terms)
        fixed = gpu_variants.tiles(bool(digits), dense, max(digits, default=1) > 1)
        grid = (triton.cdiv(width, BLOCK * fixed["C"]), triton.cdiv(rows, fixed["R"]))
        merge_tiles[grid](out, pristine, self.table(terms, first_row), len(terms), rows, width, **fixed)

    def _move_lists(self, out: torch.Tensor, pristine: torch.Tensor, terms: Sequence[Term], first_row: int) -> None:
        rows, width = out.shape
        copies, table = out.data_ptr() != pristine.data_ptr(), self.table(terms, first_row)
        if copies and self._cuda is not None:
            self._cuda.merge_lists(out, pristine, table, first_row)
            return
        fixed = gpu_variants.merging(copy=copies)
        merge_lists[(triton.cdiv(rows, fixed["L"]),)](out, pristine, table, first_row, rows, width, **fixed)

    def table(self, terms: Sequence[Term], first_row: int = 0) -> torch.Tensor:
        """The table of terms, of rows from `first_row` on. Of one term it is kept until its weight is another."""
        device = terms[0][1].device
        if len(terms) > 1:
            fields = [field for weight, delta in terms for field in term_fields(weight, delta, first_row)]
            return torch.tensor(fields, dtype=torch.int64).to(device, non_blocking=True)
        weight, delta = terms[0]
        known = self._terms.setdefault(delta, {})
        if first_row not in known or known[first_row][0] != weight:
            table = torch.tensor(term_fields(weight, delta, first_row), dtype=torch.int64)
            known[first_row] = weight, table.to(device, non_blocking=True)
        return known[first_row][1]


def slabs(matrix: torch.Tensor, itemsize: int | None = None) -> list[tuple[int, torch.Tensor]]:
    """First rows and the rows from there, multiples of 32 rows of about `SLAB_BYTES`."""
    row = matrix.shape[1] * (itemsize or matrix.itemsize)
    size = max(SLAB_BYTES // row // BLOCK, 1) * BLOCK
    return [(first, matrix[first : first + size]) for first in range(0, len(matrix), size)]
