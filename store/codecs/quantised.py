"""Quantised: a tiny tensor in few bits per element, where a budget leaves no room to keep it whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from store.codecs.base import flat_float32
from store.encodings import MAX_LEVEL, as_indices, encode_levels
from store.errors import CheckpointError, InvalidRequestError
from store.packed import PackedLevels

if TYPE_CHECKING:
    import torch


class Quantised:
    """Every element to the nearest whole multiple of one scale; the largest element is the top level.

    Args:
        top: the largest level, 1 to 127; 7 takes about 3 bits per element after entropy coding.

    Raises:
        InvalidRequestError: top is out of range.
    """

    name = "quantised"

    def __init__(self, top: int = 7) -> None:
        if not 1 <= top <= MAX_LEVEL:
            raise InvalidRequestError(f"top must be 1 to {MAX_LEVEL}, not {top}", param="top")
        self._top = top

    def compress(self, tensor: str, delta: torch.Tensor) -> PackedLevels | None:
        """See `Codec.compress`."""
        tau = flat_float32(tensor, delta)
        largest = float(np.max(np.abs(tau), initial=0.0))
        scale = float(np.float32(largest / self._top))
        if not scale:
            return None
        if not np.isfinite(scale):
            raise CheckpointError(f"tensor {tensor} has a delta too large for a float32 scale", param=tensor)
        levels = np.clip(np.rint(tau / np.float32(scale)), -self._top, self._top).astype(np.int8)
        indices = np.flatnonzero(levels)
        encoded = encode_levels(as_indices(indices, len(tau)), levels[indices], len(tau))
        return PackedLevels(tuple(delta.shape), len(indices), scale, encoded)
