"""ComPEFT: the largest entries of the whole task vector, their signs, one scale for all (arXiv 2311.13171)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from store.codecs.base import flat_float32, ternary
from store.errors import InvalidRequestError
from store.packed import PackedTernary

if TYPE_CHECKING:
    import torch

_DROPPED_BITS = 12
_BINS = 1 << (31 - _DROPPED_BITS)
"""Magnitudes are counted by the leading bits of their float32: bins of less than 0.05 % in width, each a tie."""


class ComPEFT:
    """The codec, fitted to one task vector.

    Args:
        deltas: every tensor of it, by name: read once, for the threshold and the scale that all share.
        density: fraction of all entries that are kept, 0 < density ≤ 1; ties with the smallest of them are kept too, as
            by T-Switch, so that steps of bfloat16 are never dropped as a whole.
        strength: the scale in standard deviations of the whole task vector, α of the paper.

    Raises:
        InvalidRequestError: density or strength is out of range.
        CheckpointError: a delta holds NaN or infinite values.
    """

    name = "compeft"

    def __init__(self, deltas: Iterable[tuple[str, torch.Tensor]], density: float, strength: float = 1.0) -> None:
        if not 0.0 < density <= 1.0:
            raise InvalidRequestError(f"density must be above 0 and at most 1, not {density}", param="density")
        if not 0.0 < strength < math.inf:
            raise InvalidRequestError(f"strength must be above 0, not {strength}", param="strength")
        counts = np.zeros(_BINS, dtype=np.int64)
        total = squares = 0.0
        for name, delta in deltas:
            tau = flat_float32(name, delta)
            counts += np.bincount(np.abs(tau).view(np.uint32) >> _DROPPED_BITS, minlength=_BINS)
            total += float(np.sum(tau, dtype=np.float64))
            squares += float(np.sum(np.square(tau, dtype=np.float64)))
        numel = int(counts.sum())
        above = np.cumsum(counts[::-1])[::-1]
        reach = np.flatnonzero(above >= max(1, int(density * numel)))
        first = int(reach[-1]) << _DROPPED_BITS if len(reach) else 0
        # Of a task vector with fewer nonzeros than that all are kept, and no zero is.
        self._threshold = np.array([max(1, first)], dtype=np.uint32).view(np.float32)[0]
        mean = total / max(1, numel)
        self._scale = strength * math.sqrt(max(0.0, squares / max(1, numel) - mean * mean))

    def compress(self, tensor: str, delta: torch.Tensor) -> PackedTernary | None:
        """See `Codec.compress`."""
        tau = flat_float32(tensor, delta)
        indices = np.flatnonzero(np.abs(tau) >= self._threshold)
        if not len(indices):
            return None
        return ternary(tensor, tuple(delta.shape), indices, tau[indices] > 0, self._scale)
