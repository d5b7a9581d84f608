"""Decoded task-vector tensors: what an expert file gives the engine. NumPy only; no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from store.patterns import Half


@dataclass(frozen=True)
class SparseDelta:
    """A sparse delta of one tensor: `delta.flat[indices[i]] = levels[i] * scale`, zero elsewhere.

    Attributes:
        shape: shape of the whole tensor.
        indices: `[nnz]` int32 (int64 where the tensor has 2³¹ or more elements), strictly ascending, flat row-major.
        levels: `[nnz]` int8, never 0; ±1 for ternary codecs, else up to ±127.
        scale: float32 value as a Python float; finite, > 0.
    """

    shape: tuple[int, ...]
    indices: npt.NDArray[np.int32] | npt.NDArray[np.int64]
    levels: npt.NDArray[np.int8]
    scale: float

    @property
    def nbytes(self) -> int:
        return self.indices.nbytes + self.levels.nbytes


@dataclass(frozen=True)
class DenseDelta:
    """A delta stored for every element: norms, biases and other tiny tensors; or the product of low-rank factors.

    Attributes:
        values: float32, in the tensor's own shape.
    """

    values: npt.NDArray[np.float32]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        return self.values.nbytes


@dataclass(frozen=True)
class OverwriteDelta:
    """New bit patterns for some weights of one tensor, told as distances from the base's; `store.overwriting` adds up.

    Attributes:
        shape: shape of the whole tensor.
        indices: `[nnz]` int32 (int64 where the tensor has 2³¹ or more elements), strictly ascending, flat row-major.
        steps: `[nnz]` int16, never 0: new pattern − old pattern, modulo 2¹⁶.
        half: the 16-bit type of the patterns.
        sha256: hex, of the new patterns.
    """

    shape: tuple[int, ...]
    indices: npt.NDArray[np.int32] | npt.NDArray[np.int64]
    steps: npt.NDArray[np.int16]
    half: Half
    sha256: str

    @property
    def nbytes(self) -> int:
        return self.indices.nbytes + self.steps.nbytes


Delta = SparseDelta | DenseDelta | OverwriteDelta
