"""The kernels in Triton, for GPUs. With TRITON_INTERPRET=1 in the environment they run, very slowly, on a CPU."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton

from server.engine.kernels import gpu_transcode, gpu_variants
from server.engine.kernels.checks import check_fused, check_group
from server.engine.kernels.gpu_beside import absorb, add_planes
from server.engine.kernels.gpu_bytes import add_bytes, split_rows
from server.engine.kernels.gpu_cuda import CudaKernels
from server.engine.kernels.gpu_fused import fold_rows, fused_product
from server.engine.kernels.gpu_lists import add_lists, add_sparse, stage_rows
from server.engine.kernels.gpu_moving import Mover
from server.engine.kernels.gpu_rounding import INTERPRETED
from server.engine.kernels.gpu_tables import Launch, Plans
from server.engine.kernels.packing import SPARSE_BELOW, pack
from server.engine.kernels.reference import ReferenceKernels
from server.engine.kernels.types import (
    BLOCK,
    BitPlanes,
    Group,
    LoadedTerm,
    Overwrites,
    PackedDelta,
    Term,
    rows_and_columns,
)
from store.packed import PackedTernary

_log = logging.getLogger(__name__)

FUSE_ROWS = 512
"""Rows from which a product with weights moved by lists is not slower than two products, summed over a layer: on an
H100 it was much faster at 512 with a density of 0.05, about as fast with 0.012, and slower at 128
(`python -m bench.gpu`). As many as a step has by default."""
FUSE_PLANES = 1024
"""The same with planes: it was faster at 2,048 and slower at 512."""

_TILE_SUMS = 128 * 32
"""Most sums of a tile of `add_bytes` or `add_planes`."""
_WORDS_PER_SPLIT = 2 * gpu_variants.BYTES_WORDS
_BLOCKS_PER_PROCESSOR = 1
"""What it takes to keep memory busy; columns are split for it."""
_INTERPRETED_PROCESSORS = 4


@dataclass(frozen=True)
class _Device:
    """What is kept for a device: the same memory at every launch, as CUDA graphs want it."""

    processors: int
    partial: torch.Tensor
    arrived: torch.Tensor


@dataclass(frozen=True, eq=False)
class _Split:
    """A batch as `split_rows` makes it; holding on to `x` keeps its memory from becoming that of another one."""

    x: torch.Tensor
    halves: torch.Tensor
    scales: torch.Tensor

    def is_of(self, x: torch.Tensor) -> bool:
        same = (x.data_ptr(), x.shape, x.dtype) == (self.x.data_ptr(), self.x.shape, self.x.dtype)
        return same and x.device == self.x.device


class TritonKernels:
    """A tile's planes become numbers in registers, just before the tensor cores take them.

    Decode steps add beside the base (`gpu_beside`), prompts multiply with moved weights (`gpu_fused`), merged mode
    folds deltas into copies (`gpu_merge`). Dense deltas beside the base, and what overwrites, are left to torch.

    Launches read their tables from the device: groups that a caller keeps are prepared once, and a captured launch
    stays valid for as long as they live.
    """

    name = "triton"
    fuse_rows: int | None = FUSE_ROWS
    fuse_planes = FUSE_PLANES
    lanes = 1
    lists_below = SPARSE_BELOW

    def __init__(self, cuda: CudaKernels | None = None) -> None:
        """Args:
        cuda: what takes lists and merges of one delta, if not Triton.
        """
        self._cuda = cuda
        self._plain = ReferenceKernels()
        self._plans = Plans()
        self._devices: dict[torch.device, _Device] = {}
        self._last: _Split | None = None
        self._mover = Mover(cuda)

    def prepare(self, dtype: torch.dtype, device: torch.device) -> None:
        if device.type != "cuda" or INTERPRETED.value:
            return
        began = time.perf_counter()
        with torch.cuda.device(device):
            if self._cuda is not None:
                self._cuda.module(dtype, device)
            for variant in gpu_variants.every(dtype, lists=self._cuda is None):
                variant.compile()
        _log.info("the kernels are compiled: %.1f s", time.perf_counter() - began)

    def add_linear(self, y: torch.Tensor, x: torch.Tensor, groups: Sequence[Group]) -> None:
        _check(y, x)
        self._last = None  # its caller may have written to x since
        if x.shape[1] == 1:  # a size that is made a constant, and that `add_planes` does not compile with
            for group in groups:
                check_group(group, len(y), (y.shape[1], 1))
            self._plain.add_linear(y, x, groups)
            return
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

    def add_launches(self, y: torch.Tensor, x: torch.Tensor, launches: Sequence[Launch]) -> None:
        """`add_linear` by tables that are there already. Calls on one x, one after the other, share what is made of it:
        x must not be written to in between.

        Args:
            y, x: as for `add_linear`; x has more than one column.
            launches: on rows within the batch, and deltas of the shape; what their tables name must outlive them.
        """
        _check(y, x)
        for launch in launches:
            self._add(launch, y, x)

    def absorb(self, y: torch.Tensor, sums: torch.Tensor) -> None:
        """y += sums, and sums = 0, both contiguous, of one shape and dtype."""
        absorb[(triton.cdiv(y.numel(), gpu_variants.ABSORB["N"]),)](y, sums, y.numel(), **gpu_variants.ABSORB)

    def fuses(self, group: Group) -> bool:
        """Whether `fused_linear` is the faster way for a group of `fuse_rows` rows or more."""
        return group.stop - group.start >= self.fuse_planes or not any(isinstance(d, BitPlanes) for _, d in group.terms)

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
                self._mover.multiply(y[rows], x[rows], weight, bias, group.terms)

    def merge(self, out: torch.Tensor, pristine: torch.Tensor, terms: Sequence[LoadedTerm]) -> None:
        packed = [(weight, delta) for weight, delta in terms if not isinstance(delta, Overwrites)]
        if len(packed) < len(terms):
            self._plain.merge(out, pristine, terms)
            return
        same = all(delta.shape == out.shape for _, delta in terms)
        if not (out.is_contiguous() and pristine.is_contiguous() and out.shape == pristine.shape and same):
            raise ValueError("out, pristine and the deltas must be contiguous and of one shape")
        shape = rows_and_columns(tuple(out.shape))
        self._mover.merge(out.view(shape), pristine.view(shape), packed)

    def transcode(self, name: str, tensor: PackedTernary, device: torch.device) -> PackedDelta:
        if gpu_transcode.can_transcode(tensor):
            return gpu_transcode.transcode(name, tensor, device)
        return pack(tensor.decode(name), device)

    def _add(self, launch: Launch, y: torch.Tensor, x: torch.Tensor) -> None:
        """Launches on one x, one after the other, share what is made of it: x must not be written to in between."""
        out, width, chunks = y.shape[1], x.shape[1], launch.table
        if launch.sparse:
            if self._cuda is not None and self._cuda.add_lists(y, x, launch):
                return
            fixed = gpu_variants.sparse(launch.tile, width, launch.one, launch.levels)
            grid = (triton.cdiv(out, fixed["N"]), launch.chunks)
            if launch.tile == 1:
                add_lists[grid](y, x, chunks, launch.terms, out, width, **fixed)
                return
            staged = x.new_empty(launch.chunks, width, launch.tile)
            stage_grid = (triton.cdiv(width, gpu_variants.STAGE["COLUMNS"]), launch.chunks)
            stage_rows[stage_grid](staged, x, chunks, width, M=launch.tile, **gpu_variants.STAGE)
            add_sparse[grid](y, staged, chunks, launch.terms, out, width, **fixed)
            return
        device = self._device(y.device)
        exact = x.dtype is torch.float32
        fixed = gpu_variants.planes(launch.tile, 1) if exact else gpu_variants.in_bytes(launch.tile, out, 1)
        across = triton.cdiv(out, fixed["N"])
        splits = _splits(across * launch.chunks, width, device.processors * _BLOCKS_PER_PROCESSOR)
        blocks, fixed = (across, launch.chunks, splits), {**fixed, "SPLITS": splits}
        if exact:
            add_planes[blocks](y, x, chunks, launch.terms, device.partial, device.arrived, out, width, **fixed)
            return
        split = self._split(x)
        add_bytes[blocks](
            y, split.halves, split.scales, chunks, launch.terms, device.partial, device.arrived, out, width,
            split.halves.shape[2], **fixed,
        )  # fmt: skip

    def _split(self, x: torch.Tensor) -> _Split:
        if self._last is None or not self._last.is_of(x):
            (rows, width), columns = x.shape, gpu_variants.SPLIT["COLUMNS"]
            pieces = triton.cdiv(width, columns)
            halves = x.new_empty(rows, 2, pieces * columns, dtype=torch.int8)
            scales = x.new_empty(rows, dtype=torch.float32)
            split_rows[(pieces, rows)](halves, scales, x, width, pieces * columns, **gpu_variants.SPLIT)
            self._last = _Split(x, halves, scales)
        return self._last

    def _fuse(
        self, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, terms: Sequence[Term]
    ) -> None:
        rows, out, width = len(y), y.shape[1], x.shape[1]
        fold, fixed = gpu_variants.FOLD, gpu_variants.fused(x.dtype, rows > 128, bias is not None)
        columns = BLOCK * fold["J"]
        pieces = triton.cdiv(width, columns)
        folded = x.new_empty(rows, pieces * columns)
        fold_rows[(pieces, triton.cdiv(rows, fold["M"]))](folded, x, rows, width, **fold)
        grid = (triton.cdiv(rows, fixed["M"]) * triton.cdiv(out, fixed["N"]),)
        fused_product[grid](y, folded, weight, bias, self._mover.table(terms), rows, out, width, **fixed)

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


def _check(y: torch.Tensor, x: torch.Tensor) -> None:
    if not (y.is_contiguous() and x.is_contiguous() and x.dtype is y.dtype and x.shape[0] == y.shape[0]):
        raise ValueError("y and x must be contiguous, of one dtype, and have the same rows")


def _splits(tiles: int, width: int, blocks: int) -> int:
    """Into how many parts columns are cut, for so many blocks."""
    most = triton.cdiv(width, BLOCK) // _WORDS_PER_SPLIT
    return max(
        splits for splits in gpu_variants.SPLITS if splits == 1 or (splits <= most and tiles * splits < 2 * blocks)
    )
