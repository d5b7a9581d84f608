"""Attention over the paged cache for a ragged batch: all tokens of a step in one row, no padding in the model.

The model code is transformers' own; this function is registered as its attention implementation and receives the
step's layout through the forward call's keyword arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from server.engine.kv_cache import BLOCK_TOKENS, NULL_BLOCK, KVCache

ATTENTION_NAME = "switchyard_paged"

PagedKernel = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, "Decodes", float | None, int | None, float | None], torch.Tensor
]
"""Attends to decodes: `gathered`, or what `server.engine.paged_kernels` finds."""

CacheWriter = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Writes a step's keys and values to a layer's cache: `copied`, or what `server.engine.paged_kernels` finds."""


@dataclass(frozen=True)
class Segment:
    """One sequence's share of a step: rows `start:stop` of the batch continue a context of `context` tokens."""

    start: int
    stop: int
    context: int
    blocks: tuple[int, ...]

    @property
    def length(self) -> int:
        """Keys that the last row of the segment sees."""
        return self.context + self.stop - self.start


@dataclass(eq=False)
class Decodes:
    """Rows of one new token each, with a context in the cache: attended in one padded call.

    Attributes:
        table: `[decodes, blocks]` int64 block table, padded with `NULL_BLOCK`.
        lengths: `[decodes]` int64, keys that each sees, its own included.
        rows: `[decodes]` int64, their rows of the batch; None: they are all of its rows, in order.
    """

    table: torch.Tensor
    lengths: torch.Tensor
    rows: torch.Tensor | None = None
    _masks: dict[int | None, torch.Tensor] = field(init=False, default_factory=dict)
    _narrow: tuple[torch.Tensor, torch.Tensor] | None = field(init=False, default=None)
    _arrived: dict[int, torch.Tensor] = field(init=False, default_factory=dict)

    def mask(self, window: int | None) -> torch.Tensor:
        """`[decodes, 1, 1, keys]` bool: which cached keys each sees; the same for all layers of a window."""
        if window not in self._masks:
            position = torch.arange(self.table.shape[1] * BLOCK_TOKENS, device=self.table.device)
            mask = position < self.lengths[:, None]
            if window is not None:
                mask &= position >= self.lengths[:, None] - window
            self._masks[window] = mask[:, None, None, :]
        return self._masks[window]

    def narrow(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`table` and `lengths` as int32, the same for all layers."""
        if self._narrow is None:
            self._narrow = self.table.int(), self.lengths.int()
        return self._narrow

    def arrived(self, count: int) -> torch.Tensor:
        """`[count]` int32 zeros, the same for all layers: counters of programs, which set them back."""
        if count not in self._arrived:
            self._arrived[count] = torch.zeros(count, dtype=torch.int32, device=self.table.device)
        return self._arrived[count]


@dataclass
class SlotBatch:
    """The layout of a step whose rows are decodes, all in tensors that the device reads: nothing of it is known to the
    host, so that a CUDA graph of the step stays valid whatever the tensors hold (`server.engine.graphs`)."""

    cache: KVCache
    slots: torch.Tensor
    decodes: Decodes
    chunks: tuple[Segment, ...] = ()


@dataclass
class AttentionBatch:
    """The layout of one step. `cache is None` means: segments stand alone and nothing is remembered."""

    segments: list[Segment]
    cache: KVCache | None
    device: torch.device
    decodes: Decodes | None = field(init=False, default=None)
    """Segments of one row with a context."""
    chunks: list[Segment] = field(init=False)
    slots: torch.Tensor = field(init=False)
    """`[rows]` int64: where in the cache (block × BLOCK_TOKENS + offset) each row's key and value go."""

    def __post_init__(self) -> None:
        one_row = [s.context > 0 and s.stop - s.start == 1 for s in self.segments]
        decodes = [s for s, decode in zip(self.segments, one_row, strict=True) if decode]
        self.chunks = [s for s, decode in zip(self.segments, one_row, strict=True) if not decode]
        if self.cache is None:
            return
        slots = [
            segment.blocks[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS
            for segment in self.segments
            for position in range(segment.context, segment.length)
        ]
        self.slots = torch.tensor(slots, dtype=torch.int64, device=self.device)
        if decodes:
            width = max(-(-s.length // BLOCK_TOKENS) for s in decodes)
            tables = [list(s.blocks[:width]) + [NULL_BLOCK] * (width - len(s.blocks)) for s in decodes]
            table, lengths, rows = (
                torch.tensor(values, dtype=torch.int64, device=self.device)
                for values in (tables, [s.length for s in decodes], [s.start for s in decodes])
            )
            self.decodes = Decodes(table, lengths, rows)


def _causal_mask(segment: Segment, window: int | None, device: torch.device) -> torch.Tensor:
    query = torch.arange(segment.context, segment.length, device=device)[:, None]
    key = torch.arange(segment.length, device=device)[None, :]
    mask = key <= query
    return mask if window is None else mask & (key > query - window)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float | None,
    softcap: float | None,
    mask: torch.Tensor | None,
    causal: bool = False,
) -> torch.Tensor:
    """Attention of `[b, heads, q, d]` over `[b, kv_heads, k, d]` (grouped heads), `mask` bool or None."""
    if softcap is None:
        gqa = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=gqa
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ value


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    batch: AttentionBatch | SlotBatch,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """One layer's attention for a step (transformers' attention interface).

    Args:
        query: `[1, heads, rows, head_dim]`, rotated; `key`, `value`: `[1, kv_heads, rows, head_dim]`.
        batch: the step's layout.

    Returns:
        `[1, rows, heads, head_dim]`, and None for the attention weights.
    """
    del attention_mask  # the layout knows who sees whom
    kv_heads, head_dim = key.shape[1], key.shape[3]
    if batch.cache is not None:
        layer: int = module.layer_idx  # type: ignore[assignment]
        keys, values = batch.cache.keys[layer], batch.cache.values[layer]
        (batch.cache.write or copied)(keys, values, key[0], value[0], batch.slots)
    decodes = batch.decodes
    if decodes is not None and decodes.rows is None:
        return _attend_decodes(batch)(query[0], keys, values, decodes, scaling, sliding_window, softcap)[None], None
    output = torch.empty_like(query)
    for segment in batch.chunks:
        rows = slice(segment.start, segment.stop)
        mask: torch.Tensor | None = None
        if segment.context == 0:
            k, v = key[:, :, rows], value[:, :, rows]
            if sliding_window is not None and segment.length > sliding_window:
                mask = _causal_mask(segment, sliding_window, query.device)
        else:
            blocks = list(segment.blocks[: -(-segment.length // BLOCK_TOKENS)])
            k, v = (
                cached[blocks].view(1, -1, kv_heads, head_dim)[:, : segment.length].transpose(1, 2)
                for cached in (keys, values)
            )
            mask = _causal_mask(segment, sliding_window, query.device)
        output[:, :, rows] = _attend(
            query[:, :, rows], k, v, scaling=scaling, softcap=softcap, mask=mask, causal=mask is None
        )
    if decodes is not None:
        own = query[0][:, decodes.rows]
        attended = _attend_decodes(batch)(own, keys, values, decodes, scaling, sliding_window, softcap)
        output[0][:, decodes.rows] = attended.transpose(0, 1)
    return output.transpose(1, 2), None


def _attend_decodes(batch: AttentionBatch | SlotBatch) -> PagedKernel:
    return gathered if batch.cache is None or batch.cache.attend is None else batch.cache.attend


def copied(
    keys: torch.Tensor, values: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor
) -> None:
    """`key` and `value` `[kv_heads, rows, head_dim]` to their slots `[rows]` of a layer's blocks. A `CacheWriter`."""
    for cached, new in ((keys, key), (values, value)):
        cached.view(-1, *cached.shape[2:]).index_copy_(0, slots, new.transpose(0, 1))


def gathered(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    decodes: Decodes,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """`[decodes, heads, head_dim]` of a query `[heads, decodes, head_dim]` over a layer's cached blocks. Its shapes
    depend on those of its arguments alone. A `PagedKernel`."""
    count, kv_heads, head_dim = len(decodes.table), keys.shape[2], keys.shape[3]
    k, v = (c[decodes.table].view(count, -1, kv_heads, head_dim).transpose(1, 2) for c in (keys, values))
    # Query heads of one group share a key head and see the same keys: they become that head's query rows.
    grouped = query.transpose(0, 1).reshape(count, kv_heads, -1, head_dim)
    attended = _attend(grouped, k, v, scaling=scaling, softcap=softcap, mask=decodes.mask(window))
    return attended.reshape(count, -1, head_dim)


AttentionInterface.register(ATTENTION_NAME, paged_attention)
