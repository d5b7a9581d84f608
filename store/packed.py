"""One tensor of an expert as it is stored: what a codec makes and the expert file holds. NumPy only; no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from store.bfloat16 import from_bfloat16
from store.deltas import DenseDelta, SparseDelta
from store.encodings import Encoded, decode
from store.errors import ExpertFileError


@dataclass(frozen=True)
class PackedTernary:
    """A tensor of {−scale, 0, +scale}, its positions and signs encoded.

    Attributes:
        shape: shape of the tensor.
        nnz: number of nonzeros, > 0.
        scale: a float32 value as a Python float; finite, > 0.
        encoded: positions and signs.
    """

    shape: tuple[int, ...]
    nnz: int
    scale: float
    encoded: Encoded

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def payload(self) -> bytes:
        return self.encoded.payload

    @property
    def nbytes(self) -> int:
        """Exact bytes in the data section of the expert file."""
        return len(self.encoded.payload)

    def decode(self, tensor: str) -> SparseDelta:
        """Raises ExpertFileError naming `tensor` if the payload is not what the counts promise."""
        indices, levels = decode(self.encoded, nnz=self.nnz, numel=self.numel, tensor=tensor)
        return SparseDelta(self.shape, indices, levels, self.scale)


@dataclass(frozen=True)
class PackedDense:
    """A tensor kept whole in bfloat16.

    Attributes:
        shape: shape of the tensor.
        payload: little-endian bfloat16, row-major; 2 bytes per element.
    """

    shape: tuple[int, ...]
    payload: bytes

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Exact bytes in the data section of the expert file."""
        return len(self.payload)

    def decode(self, tensor: str) -> DenseDelta:
        """Raises ExpertFileError naming `tensor` on a wrong length, NaN or infinity."""
        if len(self.payload) != 2 * self.numel:
            raise ExpertFileError(f"tensor {tensor} has {len(self.payload)} bytes, not 2 per element", param=tensor)
        values = from_bfloat16(np.frombuffer(self.payload, dtype="<u2").reshape(self.shape))
        if not bool(np.isfinite(values).all()):
            raise ExpertFileError(f"tensor {tensor} holds NaN or infinite values; create the file again", param=tensor)
        return DenseDelta(values)


PackedTensor = PackedTernary | PackedDense
