"""Attention of single tokens straight out of the paged cache, by what is fastest there of what is installed and right.

Without any of it, a decode step gathers every row's keys and values before PyTorch attends to them: it reads them,
writes them and reads them again. flash-attention reads the blocks in place, and so does a kernel of our own where
Triton is. Nothing is believed unseen: small cases are compared with PyTorch's own when the engine starts, which also
compiles what is needed later.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Protocol

import torch

from server.engine.attention import CacheWriter, Decodes, PagedKernel, copied, gathered
from server.engine.kv_cache import BLOCK_TOKENS, KVCache

log = logging.getLogger(__name__)

_LIBRARIES = (("flash_attn_interface", "page_table"), ("flash_attn", "block_table"))
"""Modules that have `flash_attn_with_kvcache`, the newer one first, and what they call the block table."""
_OWN = "server.engine.gpu_attention"
"""Needs Triton."""
_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Half precision only: the libraries know no other, and in full precision our own has too few registers."""
_SOFTCAP = 2.0
"""Low enough to change the scores. Only a model's code knows whether it caps them; who attends has to be able to."""


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
    like = cache.keys[0]
    if like.device.type != "cuda" or cache.shape.dtype not in _TOLERANCE:
        return gathered

    def right(kernel: PagedKernel) -> bool:
        return attends_rightly(kernel, cache.shape.kv_heads, heads, cache.shape.head_dim, like, (_SOFTCAP,))

    for module, table_name in _LIBRARIES:
        if (found := _attribute(module, "flash_attn_with_kvcache")) is None:
            continue
        library = flash(found, table_name)
        if _is_right(module, lambda kernel=library: right(kernel)):  # type: ignore[misc]
            log.info("decode steps attend by %s", module)
            return library
    if (for_device := _attribute(_OWN, "for_device")) is not None:
        own: PagedKernel = for_device(like.device)
        if _is_right("the kernel in Triton", lambda: right(own)):
            log.info("decode steps attend by a kernel in Triton")
            return own
    return gathered


def best_writer(cache: KVCache) -> CacheWriter:
    """What writes to this cache the fastest, on its device."""
    if cache.keys[0].device.type == "cuda" and (store := _attribute(_OWN, "store")) is not None:
        own: CacheWriter = store
        shape = cache.shape
        if _is_right("writing in Triton", lambda: writes_rightly(own, shape.kv_heads, shape.head_dim, cache.keys[0])):
            return own
    return copied


def _attribute(module: str, name: str) -> Any:
    """What a module has by that name; None if it has not, or cannot be imported."""
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, OSError):
        return None


def _is_right(name: str, check: Callable[[], bool]) -> bool:
    try:
        if check():
            return True
        log.warning("%s is not used: it treats the paged cache otherwise than PyTorch", name)
    except Exception as error:  # whatever a foreign library, a compiler or a driver raises
        log.warning("%s is not used: %s", name, error)
    return False


def attends_rightly(
    kernel: PagedKernel, kv_heads: int, heads: int, head_dim: int, like: torch.Tensor, softcaps: Sequence[float] = ()
) -> bool:
    """Whether small cases come out as PyTorch has them: unordered blocks, unequal lengths, windows and none.

    Raises whatever the kernel does.

    Args:
        like: of the cache's dtype and device.
        softcaps: to be tried besides none.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(like)

    width = 20
    keys, values = (noise(1 + 2 * width, BLOCK_TOKENS, kv_heads, head_dim) for _ in range(2))
    order = 1 + torch.randperm(2 * width, generator=generator)
    table = torch.zeros(4, width, dtype=torch.int64)
    table[0], table[1, 0], table[2, :2], table[3, :17] = order[:width], order[-1], order[-3:-1], order[width:-3]
    lengths = torch.tensor([width * BLOCK_TOKENS - 5, 1, 2 * BLOCK_TOKENS, 16 * BLOCK_TOKENS + 1])
    table, lengths = table.to(like.device), lengths.to(like.device)
    query, tolerance = noise(heads, len(table), head_dim), _TOLERANCE.get(like.dtype, 1e-4)

    def attended(by: PagedKernel, window: int | None, softcap: float | None) -> torch.Tensor:
        return by(query, keys, values, Decodes(table, lengths), 0.3, window, softcap)

    return all(
        torch.allclose(attended(kernel, *case), attended(gathered, *case), rtol=tolerance, atol=tolerance)
        for case in itertools.product((None, 9, 150), (None, *softcaps))
    )


def writes_rightly(write: CacheWriter, kv_heads: int, head_dim: int, like: torch.Tensor) -> bool:
    """Whether rows come to lie where PyTorch puts them, and nothing else changes. Raises whatever `write` does.

    Args:
        like: of the cache's dtype and device.
    """
    new = torch.randn(2, 5, kv_heads, head_dim, generator=torch.Generator().manual_seed(0)).to(like)
    key, value = new.transpose(1, 2)
    slots = torch.tensor([20, 3, 47, 16, 0], device=like.device)
    ours, plain = (like.new_zeros(2, 3, BLOCK_TOKENS, kv_heads, head_dim) for _ in range(2))
    write(ours[0], ours[1], key, value, slots)
    copied(plain[0], plain[1], key, value, slots)
    return torch.equal(ours, plain)
