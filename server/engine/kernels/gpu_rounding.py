"""How the Triton kernels round: to the nearest, ties to even, on a GPU as in Triton's interpreter."""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Whether kernels run in the interpreter, whose own cast to bfloat16 cuts off what does not fit."""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def rounded(value, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 values in another type."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = value.to(tl.uint32, bitcast=True)
        above = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(value == value, above, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(DTYPE)
