"""Attention of decode steps over the paged cache, next to what reading each key and value once takes."""

from __future__ import annotations

import statistics
from functools import partial

import torch

from bench.gpu_lab import DRY, Lab, Work, cycled
from bench.report import Row
from server.engine.attention import Decodes, PagedKernel, gathered
from server.engine.graphs import padded_width
from server.engine.kv_cache import BLOCK_TOKENS, KVCache, KVShape
from server.engine.paged_kernels import best_kernel

CONTEXTS = (256, 2048, 8192)
"""Tokens that each row sees, its own included."""
ROWS = (1, 8, 32)
_ERROR = 1e-2
_MOST_TABLES = 64
"""Calls that are queued at a time."""


def attention_rows(lab: Lab) -> list[Row]:
    """One layer of the base, each case checked before it is timed: what a server attends by here, and PyTorch on
    gathered copies. Blocks lie in no order, and others in every call; the table is as wide as graphs pad it."""
    size = lab.effort.size
    head_dim = size.hidden // size.heads
    shape = KVShape(1, size.kv_heads, head_dim, lab.dtype)
    dry = lab.effort is DRY
    contexts, batches = ((20, 70), (1, 3)) if dry else (CONTEXTS, ROWS)
    most = max(batches) * -(-max(contexts) // BLOCK_TOKENS)
    cache = KVCache(shape, max((most + 2) * shape.block_bytes, lab.effort.spread_bytes), lab.device)
    for cached in (*cache.keys, *cache.values):
        cached.normal_()
    attend = best_kernel(cache, size.heads)
    found: list[Row] = []
    for context in contexts:
        for rows in batches:
            if lab.late(f"{rows} rows, a context of {context}"):
                continue
            query = torch.randn(size.heads, rows, head_dim, device=lab.device).to(lab.dtype)
            steps = _steps(cache, rows, context)
            error = _error(attend, query, cache, steps[0])
            calls = {
                name: cycled([_work(kernel, query, cache, step) for step in steps], max(4, len(steps)))
                for name, kernel in (("ours", attend), ("gathered", gathered))
            }
            taken = lab.device_seconds(calls, min(5, lab.effort.rounds))
            seconds = {name: statistics.median(times) for name, times in taken.items()}
            nbytes = 2 * rows * context * size.kv_heads * head_dim * lab.dtype.itemsize
            floor = lab.floor(nbytes + 2 * query.nbytes)
            found.append({"what": "gathered" if attend is gathered else "in place", "context": context, "rows": rows,
                          "error": error, "µs": 1e6 * seconds["ours"], "gathered µs": 1e6 * seconds["gathered"],
                          "floor µs": 1e6 * floor, "× floor": seconds["ours"] / floor})  # fmt: skip
    return found


def _steps(cache: KVCache, rows: int, context: int) -> list[Decodes]:
    """Steps of that shape over different blocks, as many as the cache has blocks for."""
    blocks = -(-context // BLOCK_TOKENS)
    device = cache.keys[0].device
    order = 1 + torch.randperm(cache.total_blocks)
    lengths = torch.full((rows,), context, dtype=torch.int64, device=device)
    found = []
    for own in order[: len(order) // (rows * blocks) * rows * blocks].view(-1, rows, blocks)[:_MOST_TABLES]:
        table = torch.zeros(rows, padded_width(blocks, cache.total_blocks), dtype=torch.int64)
        table[:, :blocks] = own
        found.append(Decodes(table.to(device), lengths))
    return found


def _work(kernel: PagedKernel, query: torch.Tensor, cache: KVCache, step: Decodes) -> Work:
    return partial(kernel, query, cache.keys[0], cache.values[0], step, None, None, None)


def _error(attend: PagedKernel, query: torch.Tensor, cache: KVCache, step: Decodes) -> float:
    """Of the last row, relative to the same in full precision.

    Raises:
        ValueError: it is larger than rounding makes it.
    """
    blocks = step.table[-1]
    keys, values = (cached[0][blocks].float() for cached in (cache.keys, cache.values))
    alone = Decodes(torch.arange(len(blocks), device=blocks.device)[None], step.lengths[-1:])
    plain = gathered(query[:, -1:].float(), keys, values, alone, None, None, None)[0]
    made = attend(query, cache.keys[0], cache.values[0], step, None, None, None)[-1]
    error = float((made.float() - plain).norm() / plain.norm())
    if not error <= _ERROR:
        raise ValueError(f"attention over the paged cache is wrong: relative error {error:.3g}")
    return error
