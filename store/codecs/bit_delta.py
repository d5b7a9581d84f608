"""BitDelta: the sign of every entry and one scale per tensor (arXiv 2402.10193); T-Switch without a mask."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from store.codecs.base import flat_float32, ternary
from store.packed import PackedTernary

if TYPE_CHECKING:
    import torch


class BitDelta:
    """sign(τ) · mean |τ|, which is the scale of least squared error; calibration distils it, as the paper does."""

    name = "bit-delta"

    def compress(self, tensor: str, delta: torch.Tensor) -> PackedTernary | None:
        """See `Codec.compress`."""
        tau = flat_float32(tensor, delta)
        indices = np.flatnonzero(tau)
        if not len(indices):
            return None
        scale = float(np.sum(np.abs(tau), dtype=np.float64)) / len(indices)
        return ternary(tensor, tuple(delta.shape), indices, tau[indices] > 0, scale)
