"""Low rank: the largest singular directions of a delta, as two bfloat16 factors."""

from __future__ import annotations

import numpy as np
import torch

from store.bfloat16 import from_bfloat16, to_bfloat16
from store.codecs.base import flat_float32
from store.codecs.raw import Raw
from store.errors import CheckpointError, InvalidRequestError
from store.packed import PackedDense, PackedLowRank

_OVERSAMPLED = 8
_POWER_ITERATIONS = 3


class LowRank:
    """The best approximation of a given rank; tensors that are no matrices, or no larger than their factors, stay raw.

    Args:
        rank: of the approximation, at least 1.

    Raises:
        InvalidRequestError: rank is below 1.
    """

    name = "low-rank"

    def __init__(self, rank: int) -> None:
        if rank < 1:
            raise InvalidRequestError(f"rank must be at least 1, not {rank}", param="rank")
        self._rank = rank

    def compress(self, tensor: str, delta: torch.Tensor) -> PackedDense | None:
        """See `Codec.compress`."""
        tau = flat_float32(tensor, delta)
        shape = tuple(delta.shape)
        if len(shape) != 2 or self._rank * sum(shape) >= len(tau):
            return Raw().compress(tensor, delta)
        if not tau.any():
            return None
        left, right = factors(torch.from_numpy(tau).view(shape), self._rank)
        return _packed(tensor, left, right)


def keep_factors(tensor: str, left: torch.Tensor, right: torch.Tensor) -> PackedDense | None:
    """A product as it is, `[rows, rank] @ [rank, columns]` in float32; None where it is zero.

    Factors that bfloat16 holds are kept exactly. Others are the sum of two bfloat16 numbers each, at three times the
    rank: (l + l′)(r + r′) without l′r′, which is 2⁻¹⁶ of the product. Where that is no smaller than the matrix, the
    matrix is kept, in bfloat16.
    """
    if not left.any() or not right.any():
        return None
    parts = [(rounded := factor.bfloat16().float(), factor - rounded) for factor in (left, right)]
    (high, low), (upper, lower) = parts
    if low.any() or lower.any():
        left, right = torch.cat([high, low, high], dim=1), torch.cat([upper, upper, lower], dim=0)
    shape = (left.shape[0], right.shape[1])
    if left.shape[1] > min(shape) or left.numel() + right.numel() >= left.shape[0] * right.shape[1]:
        return Raw().compress(tensor, left @ right)
    return _packed(tensor, left, right)


def _packed(tensor: str, left: torch.Tensor, right: torch.Tensor) -> PackedLowRank:
    bits = to_bfloat16(np.concatenate([left.numpy().ravel(), right.numpy().ravel()]))
    if not np.isfinite(from_bfloat16(bits)).all():
        raise CheckpointError(f"tensor {tensor} has a delta too large for bfloat16", param=tensor)
    return PackedLowRank((left.shape[0], right.shape[1]), bits.astype("<u2").tobytes(), left.shape[1])


def factors(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(`[rows, rank]`, `[rank, columns]`) whose product is close to the truncated SVD of a float32 matrix.

    By random projection with power iterations (Halko et al. 2011): a full SVD of every matrix of a model takes minutes.
    Both get the square roots of the singular values. Deterministic.
    """
    width = min(rank + _OVERSAMPLED, *matrix.shape)
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(matrix @ torch.randn(matrix.shape[1], width, generator=generator)).Q
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    roots = values[:rank].sqrt()
    return (basis @ left[:, :rank]) * roots, roots[:, None] * right[:rank]
