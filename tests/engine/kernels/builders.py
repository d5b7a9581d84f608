"""Random deltas, and what they are as dense matrices."""

from __future__ import annotations

import math

import numpy as np

from store.deltas import SparseDelta


def sparse_delta(
    seed: int, shape: tuple[int, ...], density: float, *, top: int = 1, scale: float = 0.03
) -> SparseDelta:
    """A delta with about that density; levels between −top and top, `top` among them where there is a nonzero."""
    rng = np.random.default_rng(seed)
    numel = math.prod(shape)
    indices = np.flatnonzero(rng.random(numel) < density).astype(np.int32)
    levels = rng.integers(1, top, len(indices), endpoint=True) * rng.choice([-1, 1], len(indices))
    levels[:1] = top
    return SparseDelta(shape, indices, levels.astype(np.int8), scale)


def as_matrix(delta: SparseDelta) -> np.ndarray:
    """`[rows, columns]` float32."""
    values = np.zeros(math.prod(delta.shape), np.float32)
    values[delta.indices] = delta.levels.astype(np.float32) * np.float32(delta.scale)
    return values.reshape(-1, delta.shape[-1])
