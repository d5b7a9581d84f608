"""Attention of single tokens straight out of the paged cache, by a library where one is installed that can.

Without one, a decode step gathers every row's keys and values before PyTorch attends to them: it reads them, writes
them and reads them again. flash-attention reads the blocks in place. No such library is believed unseen: a small case
is compared with PyTorch's own when the engine starts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

import torch

from server.engine.attention import Decodes, PagedKernel, gathered
from server.engine.kv_cache import BLOCK_TOKENS, KVCache

log = logging.getLogger(__name__)

_LIBRARIES = (("flash_attn_interface", "page_table"), ("flash_attn", "block_table"))
"""Modules that have `flash_attn_with_kvcache`, the newer one first, and what they call the block table."""
_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Half precision only: those kernels know no other."""


class WithKVCache(Protocol):
    """flash-attention's function of that name, as far as it is used here."""

    def __call__(self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, **options: Any) -> Any: ...


def flash(function: WithKVCache, table_name: str) -> PagedKernel:
    """Args:
    function: takes `q` `[rows, 1, heads, head_dim]` and blocks as they lie in the cache.
    table_name: what it calls the block table.
    """

    def attend(
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        decodes: Decodes,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        table, lengths = decodes.narrow()
        attended: torch.Tensor = function(
            query.transpose(0, 1)[:, None],
            keys,
            values,
            cache_seqlens=lengths,
            **{table_name: table},
            softmax_scale=scaling,
            causal=True,
            window_size=(-1, -1) if window is None else (window - 1, 0),
            softcap=softcap or 0.0,
        )
        return attended[:, 0]

    return attend


def best_kernel(cache: KVCache, heads: int) -> PagedKernel:
    """What attends to this cache the fastest, on its device.

    Args:
        heads: of queries.
    """
    if cache.keys[0].device.type == "cuda" and cache.shape.dtype in _TOLERANCE:
        for module, table_name in _LIBRARIES:
            kernel = _installed(module, table_name, cache, heads)
            if kernel is not None:
                log.info("decode steps attend by %s", module)
                return kernel
    return gathered


def _installed(module: str, table_name: str, cache: KVCache, heads: int) -> PagedKernel | None:
    """The kernel of a library, if there is one that attends rightly to blocks of this size."""
    try:
        kernel = flash(import_module(module).flash_attn_with_kvcache, table_name)
    except (ImportError, AttributeError, OSError):
        return None
    try:
        if attends_rightly(kernel, cache.shape.kv_heads, heads, cache.shape.head_dim, cache.keys[0]):
            return kernel
        log.warning("%s is not used: it attends to the paged cache otherwise than PyTorch", module)
    except Exception as error:  # whatever a foreign library raises
        log.warning("%s is not used: %s", module, error)
    return None


def attends_rightly(kernel: PagedKernel, kv_heads: int, heads: int, head_dim: int, like: torch.Tensor) -> bool:
    """Whether small cases come out as PyTorch has them: unordered blocks, unequal lengths, a window and none.

    Raises whatever the kernel does.

    Args:
        like: of the cache's dtype and device.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(like)

    keys, values = (noise(7, BLOCK_TOKENS, kv_heads, head_dim) for _ in range(2))
    table = torch.tensor([[3, 1, 6], [2, 0, 0], [5, 4, 0]], device=like.device)
    lengths = torch.tensor([2 * BLOCK_TOKENS + 5, 1, 2 * BLOCK_TOKENS], device=like.device)
    query, tolerance = noise(heads, 3, head_dim), _TOLERANCE.get(like.dtype, 1e-4)
    cases: list[Callable[[PagedKernel], torch.Tensor]] = [
        lambda attend, window=window: attend(  # type: ignore[misc]
            query, keys, values, Decodes(table, lengths), 0.3, window, None
        )
        for window in (None, 9)
    ]
    return all(torch.allclose(case(kernel), case(gathered), rtol=tolerance, atol=tolerance) for case in cases)
