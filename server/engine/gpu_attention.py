"""Attention of decode steps in Triton, straight out of the paged cache, and the writes of what a step adds to it.

What flash-decoding does (Dao et al., "Flash-Decoding for long-context inference", 2023): each row's context is cut into
splits, which different programs attend to by the softmax that is corrected as it goes (Milakov and Gimelshein, 2018);
whoever comes last puts their sums together. Of a split, each key and value is read once, for all query heads that
share it. Everything is read from tensors on the device: a captured launch stays valid whatever they hold.
"""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any

import torch
import triton
import triton.language as tl

from server.engine.attention import Decodes, PagedKernel
from server.engine.kernels.gpu_rounding import INTERPRETED, rounded
from server.engine.kv_cache import BLOCK_TOKENS

_MEMBERS = 16
"""Query heads of a program: what a tensor core takes at least. Larger groups are several programs."""
_TILE_BYTES = 16 << 10
"""Of keys that a program asks for at a time, and of values."""
_STAGES = 3
_COMBINED = 8192
"""Sums of other programs that the last one reads at a time, in all of its registers together."""
_PROGRAMS_PER_PROCESSOR = 3
"""As many as its shared memory has room for."""
_LONG = 512
"""Tokens of a split from which a context is cut further than it takes to fill the device, so that a long one among
short ones does not end long after them."""
_FURTHER = 8
"""Into how many parts at most, but for very wide tables: programs that nothing is left for take time too."""
_VERY_LONG = 4096
_INTERPRETED_PROCESSORS = 4
_EVERYTHING = 2**31 - 1
_LOG2_E = math.log2(math.e)


@triton.jit(  # type: ignore[untyped-decorator, unused-ignore]
    do_not_specialize=[
        *("query_ptr", "table_ptr", "lengths_ptr"),
        *("head_stride", "row_stride", "width", "window", "fill"),
    ]
)
def attend_splits(  # type: ignore[no-untyped-def]
    out_ptr, query_ptr, keys_ptr, values_ptr, table_ptr, lengths_ptr, sums_ptr, peaks_ptr, arrived_ptr,
    head_stride, row_stride, width, window, fill, scale, cap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
    M: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, LONG: tl.constexpr, KEPT: tl.constexpr,
    AT_ONCE: tl.constexpr, CAPPED: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Up to M query heads of one key head over one split of one row's context, whole tiles of TILE tokens.

    Grid: key heads × what it takes of M for their groups, splits, rows. Splits of a row are equal shares of what it
    sees; those that nothing is left for end at once, and the others do not wait for them.

    Args:
        out_ptr: `[rows, heads, HEAD_DIM]`.
        query_ptr: heads `head_stride` apart, rows `row_stride`.
        keys_ptr, values_ptr: `[blocks, BLOCK, KV_HEADS, HEAD_DIM]`.
        table_ptr, lengths_ptr: `[rows, width]` and `[rows]` int64, every length at least 1.
        sums_ptr: `[rows, grid 0, splits, KEPT, D]` float32: what splits leave for the last one.
        peaks_ptr: `[2, rows, grid 0, splits, KEPT]` float32: their largest scores, and sums of weights.
        arrived_ptr: `[rows, grid 0]` int32, zeros before and after.
        window: how many of the latest tokens are seen.
        fill: into how many splits a row is cut for the device's sake; more where these were longer than LONG tiles.
        scale, cap: scores are `scale · q·k`, or capped `cap · tanh(½ ln 2 · scale · q·k)`; powers of two are taken.
    """
    part, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits, parts = tl.num_programs(1), tl.num_programs(0)
    pieces: tl.constexpr = (GROUP + M - 1) // M
    kv_head = part // pieces
    lane = tl.arange(0, M)
    member = (part % pieces) * M + lane
    present = member < GROUP
    dims = tl.arange(0, D)
    inside = dims < HEAD_DIM
    length = tl.load(lengths_ptr + row).to(tl.int32)
    least = tl.maximum(length - window, 0)
    first = least // TILE
    tiles = tl.cdiv(length, TILE) - first
    share = tl.maximum(tl.cdiv(tiles, splits), tl.minimum(tl.cdiv(tiles, fill), LONG))
    begin = first + split * share
    end = tl.minimum(begin + share, first + tiles)
    if begin >= end:
        return
    heads = (kv_head * GROUP + member).to(tl.int64)
    q = tl.load(
        query_ptr + row.to(tl.int64) * row_stride + heads[:, None] * head_stride + dims[None, :],
        mask=present[:, None] & inside[None, :],
        other=0.0,
    ).to(DOT)
    table = table_ptr + row.to(tl.int64) * width
    peak = tl.full((M,), float("-inf"), dtype=tl.float32)
    weights = tl.zeros((M, TILE), dtype=tl.float32)
    total = tl.zeros((M, D), dtype=tl.float32)
    position = begin * TILE + tl.arange(0, TILE)
    block = tl.load(table + position // BLOCK, mask=(position >= least) & (position < length), other=0)
    for tile in tl.range(begin, end, num_stages=STAGES):
        position = tile * TILE + tl.arange(0, TILE)
        seen = (position >= least) & (position < length)
        place = ((block * BLOCK + position % BLOCK) * KV_HEADS + kv_head) * HEAD_DIM
        # What is not seen may be anything, also no number: it is not even read.
        mask = seen[:, None] & inside[None, :]
        block = tl.load(table + (position + TILE) // BLOCK, mask=position + TILE < length, other=0)
        keys = tl.load(keys_ptr + place[:, None] + dims[None, :], mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(keys.to(DOT)), input_precision="ieee") * scale
        if CAPPED:
            scores = cap * (1 - 2 / (1 + tl.exp2(scores)))
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        shrunk = tl.exp2(peak - higher)[:, None]
        added = tl.exp2(scores - higher[:, None])
        # Added up along the tokens at the very end: until then no warp waits for another.
        weights = weights * shrunk + added
        values = tl.load(values_ptr + place[:, None] + dims[None, :], mask=mask, other=0.0)
        total = tl.dot(added.to(DOT), values.to(DOT), total * shrunk, input_precision="ieee")
        peak = higher
    weight = tl.sum(weights, axis=1)
    active = tl.cdiv(tiles, share)
    if active == 1:
        target = out_ptr + (row.to(tl.int64) * (KV_HEADS * GROUP) + heads[:, None]) * HEAD_DIM + dims[None, :]
        mask = present[:, None] & inside[None, :]
        tl.store(target, rounded(total / weight[:, None], out_ptr.dtype.element_ty), mask=mask)
        return
    # Of the M lanes of this program, those below KEPT can be present.
    cell = (row * parts + part).to(tl.int64) * splits * KEPT
    other = tl.num_programs(2).to(tl.int64) * parts * splits * KEPT
    mine = cell + split * KEPT + lane
    tl.store(peaks_ptr + mine, peak, mask=lane < KEPT)
    tl.store(peaks_ptr + other + mine, weight, mask=lane < KEPT)
    tl.store(sums_ptr + mine[:, None] * D + dims[None, :], total, mask=(lane < KEPT)[:, None])
    # Every thread's stores before the one atomic, and it before every thread's loads, which pass the L1 by.
    tl.debug_barrier()
    before = tl.atomic_add(arrived_ptr + row * parts + part, 1, sem="acq_rel", scope="gpu")
    if before == active - 1:
        tl.store(arrived_ptr + row * parts + part, 0)
        _combine(
            out_ptr, sums_ptr, peaks_ptr, cell, other, active, row, kv_head, (part % pieces) * M,
            KV_HEADS, GROUP, HEAD_DIM, D, KEPT, AT_ONCE,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _combine(  # type: ignore[no-untyped-def]
    out_ptr, sums_ptr, peaks_ptr, cell, other, active, row, kv_head, first,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    D: tl.constexpr, KEPT: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The sums of all splits, in their order, AT_ONCE at a time, so that results do not depend on who was last."""
    lane, dims = tl.arange(0, KEPT), tl.arange(0, D)
    peak = tl.full((KEPT,), float("-inf"), dtype=tl.float32)
    weight = tl.zeros((KEPT,), dtype=tl.float32)
    total = tl.zeros((KEPT, D), dtype=tl.float32)
    for start in range(0, active, AT_ONCE):
        split = start + tl.arange(0, AT_ONCE)
        there = (split < active)[:, None]
        place = cell + split[:, None] * KEPT + lane[None, :]
        own_peaks = tl.load(peaks_ptr + place, mask=there, other=float("-inf"), cache_modifier=".cg")
        own_weights = tl.load(peaks_ptr + other + place, mask=there, other=0.0, cache_modifier=".cg")
        sums = tl.load(
            sums_ptr + place[:, :, None] * D + dims[None, None, :],
            mask=there[:, :, None],
            other=0.0,
            cache_modifier=".cg",
        )
        higher = tl.maximum(peak, tl.max(own_peaks, axis=0))
        shrunk = tl.exp2(peak - higher)
        factor = tl.exp2(own_peaks - higher[None, :])
        weight = weight * shrunk + tl.sum(own_weights * factor, axis=0)
        total = total * shrunk[:, None] + tl.sum(sums * factor[:, :, None], axis=0)
        peak = higher
    head = (kv_head * GROUP + first + lane).to(tl.int64)
    target = out_ptr + (row.to(tl.int64) * (KV_HEADS * GROUP) + head[:, None]) * HEAD_DIM + dims[None, :]
    mask = (first + lane < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(target, rounded(total / weight[:, None], out_ptr.dtype.element_ty), mask=mask)


@triton.jit(  # type: ignore[untyped-decorator, unused-ignore]
    do_not_specialize=[
        *("key_ptr", "value_ptr", "slots_ptr"),
        *("key_head", "key_row", "value_head", "value_row"),
    ]
)
def store_rows(  # type: ignore[no-untyped-def]
    keys_ptr, values_ptr, key_ptr, value_ptr, slots_ptr, key_head, key_row, value_head, value_row,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One row's key and value, of all heads, to its slot in the cache. Grid: rows, pieces of WIDE elements.

    Args:
        keys_ptr, values_ptr: `[slots, KV_HEADS, HEAD_DIM]`.
        key_ptr, value_ptr: heads `key_head` and `value_head` apart, rows `key_row` and `value_row`.
        slots_ptr: `[rows]` int64.
    """
    row = tl.program_id(0)
    slot = tl.load(slots_ptr + row)
    cell = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    inside = cell < KV_HEADS * HEAD_DIM
    head, dim = (cell // HEAD_DIM).to(tl.int64), cell % HEAD_DIM
    key = tl.load(key_ptr + row.to(tl.int64) * key_row + head * key_head + dim, mask=inside)
    value = tl.load(value_ptr + row.to(tl.int64) * value_row + head * value_head + dim, mask=inside)
    target = slot * (KV_HEADS * HEAD_DIM) + cell
    tl.store(keys_ptr + target, key, mask=inside)
    tl.store(values_ptr + target, value, mask=inside)


@cache
def fixed(dtype: torch.dtype, kv_heads: int, heads: int, head_dim: int, capped: bool) -> dict[str, Any]:
    """Constants of `attend_splits`, and options of its compiler, for caches and queries of these sizes."""
    group = heads // kv_heads
    wide = max(16, triton.next_power_of_2(head_dim))
    tile = min(128, max(32, _TILE_BYTES // (wide * dtype.itemsize)))
    kept = triton.next_power_of_2(min(group, _MEMBERS))
    half = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    return {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK": BLOCK_TOKENS,
        "M": _MEMBERS,
        "D": wide,
        "TILE": tile,
        "LONG": _LONG // tile,
        "KEPT": kept,
        "AT_ONCE": max(1, _COMBINED // (kept * wide)),
        "CAPPED": capped,
        # The interpreter does not compute in bfloat16.
        "DOT": tl.float32 if INTERPRETED.value else half.get(dtype, tl.float32),
        "STAGES": _STAGES,
        "num_warps": 4,
    }


def attends(processors: int) -> PagedKernel:
    """A `PagedKernel` for a device of so many multiprocessors.

    How far contexts are cut depends on the number of rows and on the width of the block table alone, which a captured
    launch keeps; what a split then does, on the lengths.
    """
    return partial(_attend, processors * _PROGRAMS_PER_PROCESSOR)


def for_device(device: torch.device) -> PagedKernel:
    """`attends` for a CUDA device, or for the CPU in Triton's interpreter."""
    if device.type != "cuda":
        return attends(_INTERPRETED_PROCESSORS)
    return attends(torch.cuda.get_device_properties(device).multi_processor_count)


def _attend(
    programs: int,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    decodes: Decodes,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    rows, (heads, head_dim), kv_heads = len(decodes.table), query.shape[::2], keys.shape[2]
    constants = fixed(keys.dtype, kv_heads, heads, head_dim, softcap is not None)
    if query.stride(2) != 1:
        query = query.contiguous()
    width = decodes.table.shape[1]
    parts = kv_heads * triton.cdiv(constants["GROUP"], _MEMBERS)
    tokens = width * BLOCK_TOKENS
    fill = max(1, programs // (rows * parts))
    further = max(min(_FURTHER, triton.cdiv(tokens, _LONG)), triton.cdiv(tokens, _VERY_LONG))
    splits = min(max(fill, further), triton.cdiv(tokens, constants["TILE"]))
    scale = head_dim**-0.5 if scaling is None else scaling
    out = query.new_empty(rows, heads, head_dim)
    cells = rows * parts * splits * constants["KEPT"]
    sums, peaks = (torch.empty(n, dtype=torch.float32, device=out.device) for n in (cells * constants["D"], 2 * cells))
    attend_splits[(parts, splits, rows)](
        out, query, keys, values, decodes.table, decodes.lengths, sums, peaks, decodes.arrived(rows * parts),
        query.stride(0), query.stride(1), width,
        _EVERYTHING if window is None else window, fill,
        scale * _LOG2_E if softcap is None else 2 * scale * _LOG2_E / softcap,
        0.0 if softcap is None else softcap * _LOG2_E,
        **constants,
    )  # fmt: skip
    return out


def store(
    keys: torch.Tensor, values: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor
) -> None:
    """A `CacheWriter`: both writes in one launch."""
    if key.stride(2) != 1 or value.stride(2) != 1:
        key, value = key.contiguous(), value.contiguous()
    kv_heads, rows, head_dim = key.shape
    wide = min(1024, triton.next_power_of_2(kv_heads * head_dim))
    store_rows[(rows, triton.cdiv(kv_heads * head_dim, wide))](
        keys, values, key, value, slots, *key.stride()[:2], *value.stride()[:2],
        KV_HEADS=kv_heads, HEAD_DIM=head_dim, WIDE=wide,
    )  # fmt: skip
