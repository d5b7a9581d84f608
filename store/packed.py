"""One tensor of an expert as it is stored: what a codec makes and the expert file holds. NumPy only; no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from store.bfloat16 import from_bfloat16
from store.deltas import DenseDelta, OverwriteDelta, SparseDelta
from store.encodings import Encoded, decode, decode_levels, decode_steps
from store.errors import ExpertFileError
from store.patterns import Half

LARGEST = (2.0 - 2.0**-7) * 2.0**127
"""The largest finite bfloat16."""


def check_magnitude(largest: float, tensor: str) -> None:
    """Whether the largest magnitude of a tensor, decoded, stays finite where weights are bfloat16.

    Raises:
        ExpertFileError: it does not; `param` is the tensor.
    """
    if not largest <= LARGEST:
        raise ExpertFileError(f"tensor {tensor} has values up to {largest:.3g}, too large for bfloat16", param=tensor)


class _Sparse:
    """What tensors have in common whose positions and values are encoded."""

    shape: tuple[int, ...]
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


@dataclass(frozen=True)
class PackedTernary(_Sparse):
    """A tensor of {−scale, 0, +scale}, its positions and signs encoded.

    Attributes:
        shape: shape of the tensor.
        nnz: number of nonzeros, > 0.
        scale: a float32 value as a Python float; finite, > 0.
        encoded: positions and signs.
    """

    kind: ClassVar[str] = "ternary"
    shape: tuple[int, ...]
    nnz: int
    scale: float
    encoded: Encoded

    def decode(self, tensor: str) -> SparseDelta:
        """Raises ExpertFileError naming `tensor` if counts or values are not what they must be."""
        check_magnitude(self.scale, tensor)
        indices, levels = decode(self.encoded, nnz=self.nnz, numel=self.numel, tensor=tensor)
        return SparseDelta(self.shape, indices, levels, self.scale)


@dataclass(frozen=True)
class PackedLevels(PackedTernary):
    """A tensor of whole multiples of `scale`, 0 included, up to ±127; positions and levels encoded."""

    kind: ClassVar[str] = "levels"

    def decode(self, tensor: str) -> SparseDelta:
        """Raises ExpertFileError naming `tensor` if counts or values are not what they must be."""
        indices, levels = decode_levels(self.encoded, nnz=self.nnz, numel=self.numel, tensor=tensor)
        check_magnitude(self.scale * self.encoded.params["top"], tensor)
        return SparseDelta(self.shape, indices, levels, self.scale)


@dataclass(frozen=True)
class PackedDense:
    """A tensor kept whole in bfloat16.

    Attributes:
        shape: shape of the tensor.
        payload: little-endian bfloat16, row-major; 2 bytes per element.
    """

    kind: ClassVar[str] = "dense"
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
        return DenseDelta(_finite(self.payload, self.shape, tensor))


@dataclass(frozen=True)
class PackedLowRank(PackedDense):
    """A matrix kept as the product of two factors.

    Attributes:
        shape: (rows, columns) of the matrix.
        payload: little-endian bfloat16: `[rows, rank]`, then `[rank, columns]`, each row-major.
        rank: columns of the first factor and rows of the second, > 0.
    """

    kind: ClassVar[str] = "low-rank"
    rank: int

    def decode(self, tensor: str) -> DenseDelta:
        """Raises ExpertFileError naming `tensor` on a wrong length, NaN or infinity, in the product too."""
        rows, columns = self.shape
        factors = _finite(self.payload, (self.rank * (rows + columns),), tensor)
        with np.errstate(over="ignore", invalid="ignore"):
            left = factors[: rows * self.rank].reshape(rows, self.rank)
            values = left @ factors[rows * self.rank :].reshape(self.rank, columns)
        if not bool(np.isfinite(values).all()):
            raise ExpertFileError(f"tensor {tensor} has factors too large to multiply", param=tensor)
        return DenseDelta(values)


def _finite(payload: bytes, shape: tuple[int, ...], tensor: str) -> npt.NDArray[np.float32]:
    if len(payload) != 2 * math.prod(shape):
        raise ExpertFileError(f"tensor {tensor} has {len(payload)} bytes, not 2 per element", param=tensor)
    values = from_bfloat16(np.frombuffer(payload, dtype="<u2").reshape(shape))
    if not bool(np.isfinite(values).all()):
        raise ExpertFileError(f"tensor {tensor} holds NaN or infinite values; create the file again", param=tensor)
    return values


@dataclass(frozen=True)
class PackedOverwrite(_Sparse):
    """A tensor of which some weights get new bit patterns, and the others stay the base's.

    Attributes:
        shape: shape of the tensor.
        nnz: number of changed weights, > 0.
        encoded: positions, and how many patterns each new one lies from the base's.
        half: the 16-bit type of the patterns.
        sha256: of the new patterns (`store.codecs.overwrite.values_digest`).
    """

    kind: ClassVar[str] = "overwrite"
    shape: tuple[int, ...]
    nnz: int
    encoded: Encoded
    half: Half
    sha256: str

    def decode(self, tensor: str) -> OverwriteDelta:
        """Raises ExpertFileError naming `tensor` if the payload is not what the counts promise."""
        indices, steps = decode_steps(self.encoded, nnz=self.nnz, numel=self.numel, tensor=tensor)
        return OverwriteDelta(self.shape, indices, steps, self.half, self.sha256)


PackedTensor = PackedTernary | PackedDense | PackedOverwrite
