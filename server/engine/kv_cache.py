"""Paged key/value cache: fixed blocks of tokens, handed to sequences on demand, shared where prompts begin alike,
bounded in bytes."""

from __future__ import annotations

import hashlib
import math
import secrets
from array import array
from collections.abc import Callable
from dataclasses import dataclass

import torch

from server.engine.block_pool import BlockPool, Key
from server.engine.large_pages import zeros
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

    `keys[layer]` and `values[layer]` are `[blocks, BLOCK_TOKENS, kv_heads, head_dim]`. Full blocks are shared by
    sequences whose mix, tenant and tokens up to the block's end are the same, and stay to be found until their room is
    needed. A full block is never written to again, so nothing is ever copied. The key of a block is a digest over those
    three and a secret of this process: caches of different mixes can never meet, and nobody learns from the time to a
    first token what another tenant has asked.
    """

    def __init__(self, shape: KVShape, budget_bytes: int, device: torch.device, *, reuse_prefixes: bool = True) -> None:
        """Args:
            reuse_prefixes: whether blocks are shared at all.

        Raises:
            InvalidRequestError: the budget does not hold even one usable block.
        """
        blocks = budget_bytes // shape.block_bytes
        if blocks < 2:
            raise InvalidRequestError(
                f"kv_bytes={budget_bytes} is too small: this model needs at least {2 * shape.block_bytes} bytes",
                param="kv_bytes",
            )
        self.shape = shape
        self.scratch_slot = blocks * BLOCK_TOKENS
        """Where padding rows of a step may write: in a block of its own, after the last one, that nobody reads."""
        size = (shape.layers, 2, blocks + 1, BLOCK_TOKENS, shape.kv_heads, shape.head_dim)
        if device.type == "cpu":
            self._storage = zeros(math.prod(size) * shape.dtype.itemsize).view(shape.dtype).view(size)
        else:
            self._storage = torch.zeros(size, dtype=shape.dtype, device=device)
        self.keys = [self._storage[layer, 0] for layer in range(shape.layers)]
        self.values = [self._storage[layer, 1] for layer in range(shape.layers)]
        self.attend: Callable[..., torch.Tensor] | None = None
        """What attends to it for single tokens, if not PyTorch to gathered blocks (`server.engine.paged_kernels`)."""
        self.write: Callable[..., None] | None = None
        """What writes a step's keys and values to it, if not PyTorch."""
        self._pool = BlockPool(range(blocks - 1, NULL_BLOCK, -1))
        self._reuse = reuse_prefixes
        self._secret = secrets.token_bytes(32)
        self.total_blocks = blocks - 1
        self.reused_tokens = 0
        """Tokens of prompts that were found instead of computed."""

    @property
    def free_blocks(self) -> int:
        return self._pool.free

    @property
    def total_bytes(self) -> int:
        return self.total_blocks * self.shape.block_bytes

    @property
    def used_bytes(self) -> int:
        return (self.total_blocks - self.free_blocks) * self.shape.block_bytes

    @property
    def kept_bytes(self) -> int:
        """What nobody uses, but may be found again."""
        return self._pool.kept * self.shape.block_bytes

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
        if not missing:
            return True
        fresh = self._pool.take(missing)
        if fresh is None:
            return False
        # Padding of a batch reads stale slots at weight zero, and 0 × NaN is NaN: a broken expert's leftovers must not
        # reach the next owner.
        try:
            self._storage[:, :, fresh] = 0
        except Exception:
            self._pool.give_back(fresh)
            raise
        sequence.blocks.extend(fresh)
        return True

    def adopt(self, sequence: Sequence) -> None:
        """Give a sequence that has no blocks those that hold its first tokens already; at least one is left to compute,
        since the next one is sampled from it."""
        if not self._reuse or sequence.request.sampling.prompt_logprobs is not None:
            return  # likelihoods of a prompt want all of it computed
        assert not sequence.blocks
        sequence.blocks = self._pool.share(self._keys(sequence, len(sequence.tokens) - 1))
        sequence.computed = len(sequence.blocks) * BLOCK_TOKENS
        sequence.published = len(sequence.blocks)

    def note_reuse(self, sequence: Sequence) -> None:
        """Count what a sequence that begins to run has adopted: not again after a preemption."""
        if sequence.cached_tokens is None:
            sequence.cached_tokens = min(sequence.computed, len(sequence.request.prompt))
            self.reused_tokens += sequence.cached_tokens

    def publish(self, sequence: Sequence, tokens: int) -> None:
        """Let the full blocks of the first `tokens` tokens be found, which are computed or will be in this step: a step
        writes all keys and values of a layer before it reads any."""
        if not self._reuse or tokens // BLOCK_TOKENS <= sequence.published:
            return
        keys = self._keys(sequence, tokens)
        for place in range(sequence.published, len(keys)):
            self._pool.publish(sequence.blocks[place], keys[place])
        sequence.published = len(keys)

    def withdraw(self, sequence: Sequence) -> None:
        """Let nothing of a sequence be found any more: its step has failed."""
        self._pool.withdraw(sequence.blocks)

    def release(self, sequence: Sequence) -> None:
        """Take all blocks of `sequence` back; what was computed must be computed again, or found."""
        self._pool.give_back(sequence.blocks)
        sequence.blocks = []
        sequence.computed = sequence.published = 0

    def _keys(self, sequence: Sequence, tokens: int) -> list[Key]:
        """The keys of the full blocks of the first `tokens` tokens; each depends on all before it."""
        known, count = sequence.block_keys, tokens // BLOCK_TOKENS
        if not known and count:
            tenant = "-" if sequence.request.tenant is None else f"+{sequence.request.tenant}"
            known.append(_digest(self._secret, f"{sequence.mix.digest} {tenant}".encode()))
        while len(known) <= count and count:
            start = (len(known) - 1) * BLOCK_TOKENS
            known.append(_digest(known[-1], array("q", sequence.tokens[start : start + BLOCK_TOKENS]).tobytes()))
        return known[1 : count + 1]


def _digest(key: Key, content: bytes) -> Key:
    return hashlib.blake2b(content, key=key, digest_size=32).digest()
