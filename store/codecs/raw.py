"""Raw: norms, biases and other tiny tensors, kept whole in bfloat16.

Their bytes do not matter and their values do: T-Switch at low density ruins them (measured).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from store.bfloat16 import from_bfloat16, to_bfloat16
from store.codecs.base import flat_float32
from store.errors import CheckpointError
from store.packed import PackedDense

if TYPE_CHECKING:
    import torch

RAW_NUMEL = 4096


def is_raw(shape: tuple[int, ...]) -> bool:
    """True for vectors and scalars, and for matrices of fewer than `RAW_NUMEL` elements."""
    return len(shape) < 2 or int(np.prod(shape, dtype=np.int64)) < RAW_NUMEL


class Raw:
    """Every element, rounded to bfloat16."""

    name = "raw"

    def compress(self, tensor: str, delta: torch.Tensor) -> PackedDense | None:
        """See `Codec.compress`."""
        values = flat_float32(tensor, delta)
        if not values.any():
            return None
        bits = to_bfloat16(values)
        if not np.isfinite(from_bfloat16(bits)).all():
            raise CheckpointError(f"tensor {tensor} has a delta too large for bfloat16", param=tensor)
        return PackedDense(tuple(delta.shape), bits.astype("<u2").tobytes())
