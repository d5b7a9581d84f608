"""The kernels in Triton, for GPUs. With TRITON_INTERPRET=1 in the environment they run, very slowly, on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl

from server.engine.kernels import gpu_transcode
from server.engine.kernels.gpu_beside import add_planes, add_sparse, stage_rows
from server.engine.kernels.gpu_fused import fold_rows, fused_product
from server.engine.kernels.gpu_merge import merge_lists, merge_tiles
from server.engine.kernels.gpu_rounding import INTERPRETED
from server.engine.kernels.gpu_tables import PLANES_TILES, Launch, Plans, term_fields
from server.engine.kernels.packing import pack
from server.engine.kernels.reference import ReferenceKernels
from server.engine.kernels.types import (
    BLOCK,
    BitPlanes,
    DenseValues,
    Group,
    LoadedDelta,
    LoadedTerm,
    Overwrites,
    PackedDelta,
    SparseRows,
    Term,
    check_fused,
    check_group,
    rows_and_columns,
)
from store.packed import PackedTernary

FUSE_ROWS = 128
"""Rows from which a product with moved weights is faster than two products: a full tile of them shares one decoding."""

_J = 4
"""Words of a row that `add_planes` takes at a time, one for each of the threads that share it."""
_SPLITS = (1, 2, 4, 8)
_TILE_SUMS = 64 * 64
"""Most sums of a tile of `add_planes`."""
_WORDS_PER_SPLIT = 2 * _J
_BLOCKS_PER_PROCESSOR = 2
"""What it takes to keep memory busy; columns are split for it."""
SPARSE_SHAPES = {1: (16, 64), 4: (16, 32), 16: (8, 32)}
"""Batch rows of a chunk → weight rows of a tile, entries at a time."""
_SLAB_BYTES = 16 << 20
"""Of what is put together before it is rounded, or multiplied with: it stays in the L2 cache."""
_INTERPRETED_PROCESSORS = 4


@dataclass(frozen=True)
class _Device:
    """What is kept for a device: the same memory at every launch, as CUDA graphs want it."""

    processors: int
    partial: torch.Tensor
    arrived: torch.Tensor


class TritonKernels:
    """A tile's planes become numbers in registers, just before the tensor cores take them.

    Decode steps add beside the base (`gpu_beside`), prompts multiply with moved weights (`gpu_fused`), merged mode
    folds deltas into copies (`gpu_merge`). Dense deltas beside the base, and what overwrites, are left to torch.

    Launches read their tables from the device: groups that a caller keeps are prepared once, and a captured launch
    stays valid for as long as they live.
    """

    name = "triton"
    fuse_rows: int | None = FUSE_ROWS

    def __init__(self) -> None:
        self._plain = ReferenceKernels()
        self._plans = Plans()
        self._devices: dict[torch.device, _Device] = {}
        self._terms: WeakKeyDictionary[LoadedDelta, dict[tuple[float, int], torch.Tensor]] = WeakKeyDictionary()

    def add_linear(self, y: torch.Tensor, x: torch.Tensor, groups: Sequence[Group]) -> None:
        _check(y, x)
        plan = self._plans.of(groups, len(y), (y.shape[1], x.shape[1]), y.device)
        for launch in plan.launches:
            self._add(launch, y, x)
        for wide in plan.wide:
            rows = slice(wide.start, wide.stop)
            total, own = y[rows].float(), x[rows]
            for launch in wide.launches:
                self._add(launch, total, own)
            if wide.dense:
                self._plain.add_linear(total, own, [Group(0, len(total), wide.dense)])
            y[rows] = total.to(y.dtype)

    def fused_linear(
        self, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, groups: Sequence[Group]
    ) -> None:
        _check(y, x)
        check_fused(y, x, weight, bias)
        for group in groups:
            check_group(group, len(y), (y.shape[1], x.shape[1]))
            rows, (_, delta) = slice(group.start, group.stop), group.terms[0]
            if group.start == group.stop:
                continue
            if len(group.terms) == 1 and isinstance(delta, BitPlanes) and delta.digits == 1:
                self._fuse(y[rows], x[rows], weight, bias, group.terms)
            else:
                self._multiply(y[rows], x[rows], weight, bias, group.terms)

    def merge(self, out: torch.Tensor, pristine: torch.Tensor, terms: Sequence[LoadedTerm]) -> None:
        packed = [(weight, delta) for weight, delta in terms if not isinstance(delta, Overwrites)]
        if len(packed) < len(terms):
            self._plain.merge(out, pristine, terms)
            return
        same = all(delta.shape == out.shape for _, delta in terms)
        if not (out.is_contiguous() and pristine.is_contiguous() and out.shape == pristine.shape and same):
            raise ValueError("out, pristine and the deltas must be contiguous and of one shape")
        shape = rows_and_columns(tuple(out.shape))
        self._merge(out.view(shape), pristine.view(shape), packed, 0)

    def transcode(self, name: str, tensor: PackedTernary, device: torch.device) -> PackedDelta:
        if gpu_transcode.can_transcode(tensor):
            return gpu_transcode.transcode(name, tensor, device)
        return pack(tensor.decode(name), device)

    def _add(self, launch: Launch, y: torch.Tensor, x: torch.Tensor) -> None:
        out, width = y.shape[1], x.shape[1]
        chunks, terms, tile = launch.table, launch.terms, launch.tile
        if launch.sparse:
            lists, entries = SPARSE_SHAPES[tile]
            staged = tile == max(SPARSE_SHAPES)
            if staged:
                packed = x.new_empty(launch.chunks, width, tile)
                stage_rows[(triton.cdiv(width, 128), launch.chunks)](packed, x, chunks, width, M=tile, COLUMNS=128)
                x = packed
            add_sparse[(triton.cdiv(out, lists), launch.chunks)](
                y, x, chunks, terms, out, width,
                M=tile, N=lists, E=entries, STAGED=staged, ONE=launch.one, LEVELS=launch.levels,
            )  # fmt: skip
            return
        device = self._device(y.device)
        wide, warps = planes_shape(x.dtype, tile, out)
        splits = _splits(triton.cdiv(out, wide) * launch.chunks, width, device.processors * _BLOCKS_PER_PROCESSOR)
        grid = (triton.cdiv(out, wide), launch.chunks, splits)
        add_planes[grid](
            y, x, chunks, terms, device.partial, device.arrived, out, width,
            M=tile, N=wide, J=_J, SPLITS=splits, DOT=_dot(x.dtype), STAGES=3, num_warps=warps,
        )  # fmt: skip

    def _fuse(
        self, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, terms: Sequence[Term]
    ) -> None:
        rows, out, width = len(y), y.shape[1], x.shape[1]
        words = 2
        pieces = triton.cdiv(width, BLOCK * words)
        folded = x.new_empty(rows, pieces * BLOCK * words)
        fold_rows[(pieces, triton.cdiv(rows, 16))](folded, x, rows, width, M=16, J=words)
        # 32-bit numbers are multiplied without tensor cores, by more registers than a large tile leaves.
        tile, wide = (64, 64) if x.dtype is torch.float32 else (256 if rows > 128 else 128, 128)
        grid = (triton.cdiv(rows, tile) * triton.cdiv(out, wide),)
        fused_product[grid](
            y, folded, weight, bias, self._table(terms, 0), rows, out, width,
            M=tile, N=wide, J=words, BAND=8, BIAS=bias is not None, DOT=_dot(x.dtype),
            STAGES=2 if x.dtype is torch.float32 else 3, num_warps=8,
        )  # fmt: skip

    def _multiply(
        self, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, terms: Sequence[Term]
    ) -> None:
        """Weights are moved a slab at a time, which torch then multiplies with out of the cache."""
        for first, slab in _slabs(weight):
            moved = torch.empty_like(slab)
            self._merge(moved, slab, terms, first)
            rows = slice(first, first + len(slab))
            if bias is None:
                torch.mm(x, moved.T, out=y[:, rows])
            else:
                torch.addmm(bias[rows], x, moved.T, out=y[:, rows])

    def _merge(self, out: torch.Tensor, pristine: torch.Tensor, terms: Sequence[Term], first_row: int) -> None:
        """Of some rows of the deltas, a multiple of 32 from the first."""
        lists = [isinstance(delta, SparseRows) for _, delta in terms]
        if not any(lists):
            self._move_tiles(out, pristine, terms, first_row)
        elif len(terms) == 1:
            self._move_lists(out, pristine, terms, first_row)
        else:
            for first, slab in _slabs(pristine, itemsize=4):
                total = torch.zeros(slab.shape, dtype=torch.float32, device=slab.device)
                for term, is_lists in zip(terms, lists, strict=True):
                    move = self._move_lists if is_lists else self._move_tiles
                    move(total, total, [term], first_row + first)
                out[first : first + len(slab)] = total.add_(slab)

    def _move_tiles(self, out: torch.Tensor, pristine: torch.Tensor, terms: Sequence[Term], first_row: int) -> None:
        rows, width = out.shape
        digits = [delta.digits for _, delta in terms if isinstance(delta, BitPlanes)]
        dense = any(isinstance(delta, DenseValues) for _, delta in terms)
        merge_tiles[(triton.cdiv(width, 4 * BLOCK), triton.cdiv(rows, BLOCK))](
            out, pristine, self._table(terms, first_row), len(terms), rows, width,
            R=BLOCK, C=4, PLANES=bool(digits), DENSE=dense, MANY=max(digits, default=1) > 1, **UNFUSED,
        )  # fmt: skip

    def _move_lists(self, out: torch.Tensor, pristine: torch.Tensor, terms: Sequence[Term], first_row: int) -> None:
        rows, width = out.shape
        merge_lists[(triton.cdiv(rows, 8),)](
            out, pristine, self._table(terms, first_row), first_row, rows, width,
            L=8, COLUMNS=512, E=32, COPY=out.data_ptr() != pristine.data_ptr(), **UNFUSED,
        )  # fmt: skip

    def _table(self, terms: Sequence[Term], first_row: int) -> torch.Tensor:
        """Of one term it is kept for as long as its delta lives."""
        device = terms[0][1].device
        if len(terms) > 1:
            fields = [field for weight, delta in terms for field in term_fields(weight, delta, first_row)]
            return torch.tensor(fields, dtype=torch.int64).to(device, non_blocking=True)
        weight, delta = terms[0]
        known = self._terms.setdefault(delta, {})
        table = known.get((weight, first_row))
        if table is None:
            table = torch.tensor(term_fields(weight, delta, first_row), dtype=torch.int64).to(device, non_blocking=True)
            known[weight, first_row] = table
        return table

    def _device(self, device: torch.device) -> _Device:
        known = self._devices.get(device)
        if known is None:
            processors = _INTERPRETED_PROCESSORS
            if device.type == "cuda":
                processors = torch.cuda.get_device_properties(device).multi_processor_count
            blocks = processors * _BLOCKS_PER_PROCESSOR
            partial = torch.empty(2 * blocks * _TILE_SUMS, device=device)
            arrived = torch.zeros(blocks, dtype=torch.int32, device=device)
            known = self._devices[device] = _Device(processors, partial, arrived)
        return known


UNFUSED: dict[str, Any] = {} if INTERPRETED.value else {"enable_fp_fusion": False}
"""Fused multiply-adds round once where the reference rounds twice."""


def _check(y: torch.Tensor, x: torch.Tensor) -> None:
    if not (y.is_contiguous() and x.is_contiguous() and x.dtype is y.dtype and x.shape[0] == y.shape[0]):
        raise ValueError("y and x must be contiguous, of one dtype, and have the same rows")


def _dot(dtype: torch.dtype) -> Any:
    """What the tensor cores are given; the interpreter does not compute in bfloat16."""
    if INTERPRETED.value:
        return tl.float32
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(dtype, tl.float32)


def planes_shape(dtype: torch.dtype, tile: int, out: int) -> tuple[int, int]:
    """Weight rows of a tile of `add_planes`, and its warps. More rows share what it takes to bring the batch into the
    tensor cores' order, as long as the sums fit the registers; 32-bit numbers take more of these."""
    if dtype is torch.float32:
        return 64, 8 if tile == PLANES_TILES[-1] else 4
    return (128 if tile < PLANES_TILES[-1] and out > 64 else 64), 4


def _splits(tiles: int, width: int, blocks: int) -> int:
    """Into how many parts columns are cut, for so many blocks."""
    most = triton.cdiv(width, BLOCK) // _WORDS_PER_SPLIT
    return max(splits for splits in _SPLITS if splits == 1 or (splits <= most and tiles * splits < 2 * blocks))


def _slabs(matrix: torch.Tensor, itemsize: int | None = None) -> list[tuple[int, torch.Tensor]]:
    """First rows and the rows from there, multiples of 32 rows of about `_SLAB_BYTES`."""
    row = matrix.shape[1] * (itemsize or matrix.itemsize)
    size = max(_SLAB_BYTES // row // BLOCK, 1) * BLOCK
    return [(first, matrix[first : first + size]) for first in range(0, len(matrix), size)]
