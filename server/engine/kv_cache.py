"""Paged key/value cache: fixed blocks of tokens, handed to sequences on demand, bounded in bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from server.engine.sequence import Sequence
from store.errors import InvalidRequestError

BLOCK_TOKENS = 16
NULL_BLOCK = 0
"""Never allocated, always zero: pads block tables of unequal length."""


@dataclass(frozen=True)
class KVShape:
    """What one token costs: `layers` × 2 × `kv_heads` × `head_dim` elements of `dtype`."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        return 2 * self.layers * BLOCK_TOKENS * self.kv_heads * self.head_dim * self.dtype.itemsize


class KVCache:
    """Keys and values of all layers in blocks of `BLOCK_TOKENS` tokens.

    `keys[layer]` and `values[layer]` are `[blocks, BLOCK_TOKENS, kv_heads, head_dim]`. A block belongs to at most
    one sequence, so caches of different mixes can never meet.
    """

    def __init__(self, shape: KVShape, budget_bytes: int, device: torch.device) -> None:
        """Raises:
        InvalidRequestError: the budget does not hold even one usable block.
        """
        blocks = budget_bytes // shape.block_bytes
        if blocks < 2:
            raise InvalidRequestError(
                f"kv_bytes={budget_bytes} is too small: this model needs at least {2 * shape.block_bytes} bytes",
                param="kv_bytes",
            )
        self.shape = shape
        size = (shape.layers, 2, blocks, BLOCK_TOKENS, shape.kv_heads, shape.head_dim)
        self._storage = torch.zeros(size, dtype=shape.dtype, device=device)
        self.keys = [self._storage[layer, 0] for layer in range(shape.layers)]
        self.values = [self._storage[layer, 1] for layer in range(shape.layers)]
        self._free = list(range(blocks - 1, NULL_BLOCK, -1))
        self.total_blocks = blocks - 1

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    @property
    def total_bytes(self) -> int:
        return self.total_blocks * self.shape.block_bytes

    @property
    def used_bytes(self) -> int:
        return (self.total_blocks - self.free_blocks) * self.shape.block_bytes

    @property
    def capacity_tokens(self) -> int:
        """The longest single sequence that fits when nothing else runs."""
        return self.total_blocks * BLOCK_TOKENS

    def blocks_missing(self, sequence: Sequence, tokens: int) -> int:
        """How many more blocks `sequence` needs so that its first `tokens` tokens fit."""
        return max(0, -(-tokens // BLOCK_TOKENS) - len(sequence.blocks))

    def grow(self, sequence: Sequence, tokens: int) -> bool:
        """Give `sequence` the blocks for its first `tokens` tokens; False, and nothing changed, if they are short."""
        missing = self.blocks_missing(sequence, tokens)
        if missing > self.free_blocks:
            return False
        if missing:
            fresh = [self._free.pop() for _ in range(missing)]
            # Padding of a batch reads stale slots at weight zero, and 0 × NaN is NaN: a broken expert's leftovers
            # must not reach the next owner.
            self._storage[:, :, fresh] = 0
            sequence.blocks.extend(fresh)
        return True

    def release(self, sequence: Sequence) -> None:
        """Take all blocks of `sequence` back; what was computed must be computed again."""
        self._free.extend(reversed(sequence.blocks))
        sequence.blocks.clear()
        sequence.computed = 0
