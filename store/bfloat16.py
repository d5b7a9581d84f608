"""bfloat16 as uint16 bit patterns: NumPy has no such type, and the file format must not need torch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_QUIET_NAN = np.uint16(0x7FC0)


def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round float32 to the nearest bfloat16, ties to even, as torch and the hardware do.

    Args:
        values: float32, any shape.

    Returns:
        uint16 bit patterns, same shape. Every NaN becomes 0x7FC0; values beyond the largest bfloat16 become infinite.
    """
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    # The carry of the rounding would turn some NaNs into infinities or zeros.
    rounded[(bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)] = _QUIET_NAN
    return rounded.reshape(values.shape)


def from_bfloat16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Widen bfloat16 bit patterns (uint16, any shape) to float32; exact."""
    wide = np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16)
    return wide.view(np.float32).reshape(bits.shape)
