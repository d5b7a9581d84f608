"""What kernels refuse, whichever implementation they are of."""

from __future__ import annotations

import torch

from server.engine.kernels.types import Group, rows_and_columns


def check_group(group: Group, rows: int, shape: tuple[int, int]) -> None:
    """Raises ValueError for a group that is not within so many rows, or a delta that is not of the shape (out, in)."""
    if not 0 <= group.start <= group.stop <= rows:
        raise ValueError(f"the group [{group.start}, {group.stop}) is not within {rows} rows")
    for _, delta in group.terms:
        if rows_and_columns(delta.shape) != shape:
            raise ValueError(f"a delta of shape {delta.shape} cannot be applied to {shape[1]} → {shape[0]}")


def check_fused(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raises ValueError unless weight and bias are contiguous, of the right shapes and of y's dtype."""
    fits = weight.shape == (y.shape[1], x.shape[1]) and weight.is_contiguous() and weight.dtype is y.dtype
    if not fits or (bias is not None and (bias.shape != y.shape[1:] or bias.dtype is not y.dtype)):
        raise ValueError("weight and bias must be contiguous, of y's dtype, and of the product's shape")
