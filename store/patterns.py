"""16-bit weights as bit patterns: what is changed bit by bit must not pass through arithmetic. NumPy only; no torch."""

from __future__ import annotations

from enum import StrEnum

import numpy as np
import numpy.typing as npt

from store.bfloat16 import from_bfloat16, to_bfloat16

Patterns = npt.NDArray[np.uint16]


class Half(StrEnum):
    """A 16-bit floating-point type, by its safetensors word."""

    BF16 = "BF16"
    F16 = "F16"


def widen(patterns: Patterns, half: Half) -> npt.NDArray[np.float32]:
    """The float32 values of bit patterns, in their shape; exact."""
    if half is Half.BF16:
        return from_bfloat16(patterns)
    return patterns.view(np.float16).astype(np.float32)


def patterns_of(stored: npt.NDArray[np.generic], dtype: str, half: Half) -> Patterns:
    """The bit patterns of weights in a 16-bit type, rounded where they do not fit.

    Args:
        stored: as `CheckpointTensor.read` gives them: bfloat16 as uint16.
        dtype: the safetensors word of what is stored.
        half: the type wanted.
    """
    if dtype == half:
        return stored.astype(np.uint16, copy=False) if half is Half.BF16 else stored.view(np.uint16)
    values = from_bfloat16(stored.astype(np.uint16)) if dtype == Half.BF16 else stored.astype(np.float32)
    if half is Half.BF16:
        return to_bfloat16(values)
    with np.errstate(over="ignore"):
        return values.astype(np.float16).view(np.uint16)


def exact_patterns(stored: npt.NDArray[np.generic], dtype: str, half: Half) -> Patterns | None:
    """`patterns_of`, or None where a weight is not exactly a number of that type (so, too, for most NaNs)."""
    patterns = patterns_of(stored, dtype, half)
    if dtype == half:
        return patterns
    values = from_bfloat16(stored.astype(np.uint16)) if dtype == Half.BF16 else stored
    back = widen(patterns, half).astype(values.dtype)
    # Signs of zeros count: equal bits, not equal numbers.
    same = bool(np.array_equal(back.view(f"u{back.itemsize}"), values.view(f"u{back.itemsize}")))
    return patterns if same else None
