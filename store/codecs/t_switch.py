"""T-Switch: the strongest entries of a task vector, their signs, one scale (arXiv 2412.00054).

Positives and negatives are trimmed separately: on each side the int(count · (1 − α)) largest magnitudes are kept
(ties with the smallest kept value too; exact zeros count on neither side), and what is left becomes ±scale.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from store.codecs.base import flat_float32
from store.encodings import as_indices, encode_smallest
from store.errors import CheckpointError, InvalidRequestError
from store.packed import PackedTernary

if TYPE_CHECKING:
    import torch


class Knob(StrEnum):
    """How the scale restores the magnitude that trimming took away."""

    RMS = "rms"
    """‖τ ⊙ A‖₂ / √nnz, the paper's: keeps the L2 norm of the trimmed vector. Measured too weak below density 0.2."""
    L1 = "l1"
    """Σ|τ| / nnz over the untrimmed tensor: keeps the L1 mass, and needs no data."""
    CALIBRATED = "calibrated"
    """RMS times a multiplier per tensor, learned on exemplars (`store.calibrate`)."""


class TSwitch:
    """The codec at one density.

    Args:
        density: fraction of the nonzeros kept on each side, 1 − α of the paper; 0 < density ≤ 1.
        knob: `Knob.RMS` or `Knob.L1`; a calibrated expert starts as RMS.

    Raises:
        InvalidRequestError: density is out of range.
    """

    name = "t-switch"

    def __init__(self, density: float, knob: Knob = Knob.RMS) -> None:
        if not 0.0 < density <= 1.0:
            raise InvalidRequestError(f"density must be above 0 and at most 1, not {density}", param="density")
        self._density = density
        self._l1 = knob is Knob.L1

    def compress(self, tensor: str, delta: torch.Tensor) -> PackedTernary | None:
        """See `Codec.compress`."""
        tau = flat_float32(tensor, delta)
        indices = self._survivors(tau)
        if not len(indices):
            return None
        kept = tau[indices]
        levels = np.where(kept > 0, 1, -1).astype(np.int8)
        if self._l1:
            scale = float(np.sum(np.abs(tau), dtype=np.float64)) / len(indices)
        else:
            scale = float(np.sqrt(np.mean(np.square(kept, dtype=np.float64))))
        if scale > float(np.finfo(np.float32).max):
            raise CheckpointError(f"tensor {tensor} has a delta too large for a float32 scale", param=tensor)
        encoded = encode_smallest(as_indices(indices, len(tau)), levels, len(tau))
        return PackedTernary(tuple(delta.shape), len(indices), float(np.float32(scale)), encoded)

    def _survivors(self, tau: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        """Ascending flat indices of what is kept.

        The k-th largest positive is the k-th largest entry of all, and likewise for the negatives, so one selection
        (O(n), no sort) over the whole array gives both thresholds.
        """
        keep_high = int(np.count_nonzero(tau > 0) * self._density)
        keep_low = int(np.count_nonzero(tau < 0) * self._density)
        ranks = [len(tau) - keep_high] * (keep_high > 0) + [keep_low - 1] * (keep_low > 0)
        if not ranks:
            return np.empty(0, dtype=np.int64)
        ordered = np.partition(tau, ranks)
        mask = np.zeros(len(tau), dtype=np.bool_)
        if keep_high:
            mask |= tau >= ordered[len(tau) - keep_high]
        if keep_low:
            mask |= tau <= ordered[keep_low - 1]
        return np.flatnonzero(mask)


def reference(tau: torch.Tensor, density: float, knob: Knob = Knob.RMS) -> torch.Tensor:
    """T-Switch in plain PyTorch, for the tests: the dense float32 reconstruction, in the shape of `tau`."""
    tau = tau.float()
    mask = tau != tau  # all False
    for side in (tau, -tau):
        values = side[side > 0].sort(descending=True).values
        keep = int(len(values) * density)
        if keep:
            mask |= side >= values[keep - 1]
    nnz = mask.sum().clamp(min=1)
    scale = tau.double().abs().sum() / nnz if knob is Knob.L1 else (tau * mask).double().norm() / nnz.sqrt()
    return tau.sign() * mask * scale.float()
