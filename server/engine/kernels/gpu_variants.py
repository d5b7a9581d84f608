"""What launches of the Triton kernels fix when they are compiled, and all that there can be: a server compiles them
when it starts, not while requests wait."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from server.engine.kernels import gpu_transcode
from server.engine.kernels.gpu_beside import absorb, add_planes
from server.engine.kernels.gpu_bytes import add_bytes, split_rows
from server.engine.kernels.gpu_fused import fold_rows, fused_product
from server.engine.kernels.gpu_lists import add_lists, add_sparse, stage_rows
from server.engine.kernels.gpu_merge import merge_lists, merge_tiles
from server.engine.kernels.gpu_rounding import INTERPRETED
from server.engine.kernels.gpu_tables import PLANES_TILES, SPARSE_TILES
from server.engine.kernels.types import BLOCK

Fixed = Mapping[str, Any]
"""Constants of a kernel, and options of its compiler."""

PLANES_WORDS = 4
"""Words of a row that `add_planes` takes at a time, one for each of the threads that share it."""
BYTES_WORDS = 8
"""The same of `add_bytes`."""
SPLITS = (1, 2, 4, 8)
"""Into how many parts columns may be cut."""
SPLIT: Fixed = {"J": BYTES_WORDS, "COLUMNS": 1024}
STAGE: Fixed = {"COLUMNS": 128}
FOLD: Fixed = {"M": 16, "J": 2}
ABSORB: Fixed = {"N": 1024}
_SPARSE_SHAPES = {1: (32, 16, 4), 16: (8, 32, 4), 32: (8, 32, 4)}
"""Batch rows of a chunk → weight rows of a tile, entries at a time, warps."""
LIST_WIDTHS = tuple(1 << power for power in range(10, 16))
"""Widths up to which batch rows of `add_lists` are padded; no delta with more columns is one of lists."""
_UNFUSED: Fixed = {} if INTERPRETED.value else {"enable_fp_fusion": False}
"""Fused multiply-adds round once where the reference rounds twice."""
_INTEGERS = (
    *("chunk_ptr", "term_ptr", "arrived_ptr", "words_ptr", "counts_ptr", "upto_ptr", "found_ptr", "values_ptr"),
    *("sums_ptr", "indices_ptr", "planes_ptr", "mask_ptr", "signs_ptr"),
)
_POINTERS = dict.fromkeys(_INTEGERS, torch.int32) | {"chunk_ptr": torch.int64, "term_ptr": torch.int64}
_POINTERS |= {"partial_ptr": torch.float32, "scale_ptr": torch.float32, "bytes_ptr": torch.int8}


@cache
def planes(tile: int, splits: int) -> Fixed:
    """Of `add_planes`, which takes no fewer than 16 batch rows."""
    constants = {"M": max(16, tile), "N": 64, "J": PLANES_WORDS, "SPLITS": splits, "STAGES": 3}
    return constants | {"num_warps": 4}


@cache
def in_bytes(tile: int, out: int, splits: int) -> Fixed:
    """Of `add_bytes`."""
    constants = {"M": tile, "N": 64 if out <= 64 else 128, "J": BYTES_WORDS, "SPLITS": splits, "STAGES": 3}
    return constants | {"num_warps": 4}


@cache
def sparse(tile: int, width: int, one: bool, levels: bool) -> Fixed:
    """Of `add_lists`, for a tile of one batch row, and of `add_sparse`."""
    lists, entries, warps = _SPARSE_SHAPES[tile]
    own = {"W": max(LIST_WIDTHS[0], triton.next_power_of_2(width))} if tile == 1 else {"M": tile}
    return own | {"N": lists, "E": entries, "ONE": one, "LEVELS": levels, "num_warps": warps}


@cache
def fused(dtype: torch.dtype, large: bool, bias: bool) -> Fixed:
    """Of `fused_product`. 32-bit numbers are multiplied without tensor cores, by more registers than a large tile
    leaves.

    Args:
        large: whether there are more than 128 rows.
    """
    is_wide = dtype is torch.float32
    tile, wide = (64, 64) if is_wide else (256 if large else 128, 128)
    constants = {"M": tile, "N": wide, "J": FOLD["J"], "BAND": 8, "BIAS": bias, "DOT": _dot(dtype)}
    return constants | {"STAGES": 2 if is_wide else 3, "num_warps": 8}


@cache
def tiles(planes: bool, dense: bool, many: bool) -> Fixed:
    """Of `merge_tiles`."""
    return {"R": BLOCK, "C": 4, "PLANES": planes, "DENSE": dense, "MANY": many, **_UNFUSED}


@cache
def merging(*, copy: bool) -> Fixed:
    """Of `merge_lists`."""
    return {"L": 8, "COLUMNS": 512, "E": 32, "COPY": copy, **_UNFUSED}


@dataclass(frozen=True)
class Variant:
    """One kernel as it is launched.

    Attributes:
        dtype: of the tensors whose type is not always the same.
        fixed: constants and options.
        single: whether there is one term, which is then a constant.
    """

    kernel: Any
    dtype: torch.dtype
    fixed: Fixed
    single: bool = True

    @property
    def absent(self) -> tuple[str, ...]:
        """Pointers that are None."""
        return () if self.fixed.get("BIAS", True) else ("bias_ptr",)

    def pointer(self, name: str) -> torch.dtype:
        """What a pointer of that name points to."""
        return _POINTERS.get(name, self.dtype)

    def compile(self) -> None:
        """For the current GPU, as a launch on a model's shapes would. What has been compiled once is kept on disk."""
        given = [name for name in self.kernel.arg_names if name not in self.fixed]
        others = {"terms": 1 if self.single else 2} | dict.fromkeys(self.absent)
        pointers = {name: self.pointer(name) for name in given if name.endswith("_ptr")}
        arguments = [(pointers | others).get(name, 4096) for name in given]
        self.kernel.warmup(*arguments, grid=(1,), **self.fixed)


def every(dtype: torch.dtype, *, lists: bool = True) -> Iterator[Variant]:
    """All variants that launches on weights of that type take, but for mixes of several forms, which are rare.

    Args:
        lists: whether with those that lists take.
    """
    for tile, splits in itertools.product(PLANES_TILES, SPLITS):
        if dtype is torch.float32:
            yield Variant(add_planes, dtype, planes(tile, splits))
            continue
        for out in (64, 4096):
            yield Variant(add_bytes, dtype, in_bytes(tile, out, splits))
    if dtype is not torch.float32:
        yield Variant(split_rows, dtype, SPLIT)
    if lists:
        yield from _on_lists(dtype)
    yield Variant(absorb, dtype, ABSORB)
    yield Variant(fold_rows, dtype, FOLD)
    for large, bias in itertools.product((False,) if dtype is torch.float32 else (False, True), (False, True)):
        yield Variant(fused_product, dtype, fused(dtype, large, bias))
    for many, single in ((False, True), (True, True), (False, False), (True, False)):
        yield Variant(merge_tiles, dtype, tiles(True, False, many), single)
    yield Variant(merge_tiles, dtype, tiles(False, True, False))
    for kernel, fixed in gpu_transcode.VARIANTS:
        yield Variant(kernel, torch.int32, fixed)


def _on_lists(dtype: torch.dtype) -> Iterator[Variant]:
    for one, levels in itertools.product((True, False), (False, True)):
        for width in LIST_WIDTHS:
            yield Variant(add_lists, dtype, sparse(1, width, one, levels))
        for tile in SPARSE_TILES[1:]:
            yield Variant(add_sparse, dtype, sparse(tile, 0, one, levels))
    for tile in SPARSE_TILES[1:]:
        yield Variant(stage_rows, dtype, {"M": tile, **STAGE})
    yield Variant(merge_lists, dtype, merging(copy=True))


def _dot(dtype: torch.dtype) -> Any:
    """What the tensor cores are given; the interpreter does not compute in bfloat16."""
    if INTERPRETED.value:
        return tl.float32
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(dtype, tl.float32)
