"""What mixed mode works with: an expert's tensor in packed form, and which rows of a batch it is for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from store.packed import PackedTernary

BLOCK = 32
"""Rows of a tensor that lie side by side in `BitPlanes`, and columns in one of its words."""


@dataclass(frozen=True, eq=False)
class BitPlanes:
    """A delta as bit planes: two bits per weight and digit, read without decoding an index.

    A level is written in balanced ternary, Σ_k 3^k · digit_k with digits −1, 0, +1; a ternary delta has one digit.
    Leading dimensions count as rows. Rows and columns are padded to 32 with zeros.

    Attributes:
        shape: of the whole tensor.
        scale: what one level is worth.
        words: `[rows/32, digits, columns/32, 2, 32]` int32. Bit c of `words[b, k, j, 0, r]` says that digit k of the
            element in row 32·b + r and column 32·j + c is +1; of `words[b, k, j, 1, r]`, that it is −1.
    """

    shape: tuple[int, ...]
    scale: float
    words: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.words.nbytes

    @property
    def device(self) -> torch.device:
        return self.words.device

    @property
    def digits(self) -> int:
        return self.words.shape[1]


@dataclass(frozen=True, eq=False)
class SparseRows:
    """A delta as a list of nonzeros per row, for few of them.

    Within each 32 rows, they are sorted by their number of nonzeros, most first: neighbours can be worked on in step,
    and whoever has a block of 32 touches no other rows.
    Where `lanes` lists lie abreast, there come all their first entries, then the second ones of those that have any,
    and so on: in the order of the lists each time, so of a shrinking number of the first of them.
    Leading dimensions count as rows.

    Attributes:
        shape: of the whole tensor.
        scale: what one level is worth.
        order: `[rows]` int32, the row that each list belongs to.
        starts: `[rows + 1]` int32, how many entries the lists before have, in `order`'s order: where each list starts,
            if they lie one after the other.
        entries: `[nnz]` int16 holding unsigned values: 2 · column + (1 if negative), ascending within a list.
        levels: `[nnz]` uint8, magnitudes; None where all are 1.
        lanes: how many lists lie abreast: 1, or 16.
    """

    shape: tuple[int, ...]
    scale: float
    order: torch.Tensor
    starts: torch.Tensor
    entries: torch.Tensor
    levels: torch.Tensor | None
    lanes: int = 1

    @property
    def nbytes(self) -> int:
        levels = 0 if self.levels is None else self.levels.nbytes
        return self.order.nbytes + self.starts.nbytes + self.entries.nbytes + levels

    @property
    def device(self) -> torch.device:
        return self.entries.device


PIECE = 127
"""Most columns of a piece of `ByteLists`: seven bits name one of them, or none."""


@dataclass(frozen=True, eq=False)
class ByteLists:
    """A delta as lists of nonzeros in bytes, for CPUs that look up 64 bytes at once.

    Within each 32 rows, lists are in the order of those of `SparseRows`. Columns are cut into pieces of `width`.
    Sixteen neighbouring lists have, piece by piece, as many vectors as the longest of them needs there, four entries of
    each list in a vector; what a list does not need is `PIECE`. Leading dimensions count as rows.

    Attributes:
        shape: of the whole tensor.
        scale: what one level is worth.
        places: `[32 * blocks]` uint8, for each row, up to a multiple of 32, which of its block's lists is its own.
        starts: `[2 * blocks + 1]` int32: how many vectors the lists before have, for each sixteen of them.
        pieces: `[vectors]` uint8, which piece of columns a vector is of.
        entries: `[vectors, 16, 4]` uint8: column within the piece + (128 if negative), ascending within list and piece.
        levels: `[vectors, 16, 4]` uint8, magnitudes, zeros where there is no entry; None where all are 1.
    """

    shape: tuple[int, ...]
    scale: float
    places: torch.Tensor
    starts: torch.Tensor
    pieces: torch.Tensor
    entries: torch.Tensor
    levels: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        levels = 0 if self.levels is None else self.levels.nbytes
        return self.places.nbytes + self.starts.nbytes + self.pieces.nbytes + self.entries.nbytes + levels

    @property
    def device(self) -> torch.device:
        return self.entries.device

    @property
    def width(self) -> int:
        """Columns of a piece; the last one may have fewer."""
        return piece_width(self.shape[-1])


@dataclass(frozen=True, eq=False)
class DenseValues:
    """A delta with a value for every element: norms, biases and other small tensors.

    Attributes:
        values: float32, in the tensor's own shape.
    """

    values: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    @property
    def device(self) -> torch.device:
        return self.values.device


@dataclass(frozen=True, eq=False)
class Overwrites:
    """New values for some weights, exactly a fine-tune's; kernels do not read it: it is merged, never applied beside.

    Attributes:
        shape: of the whole tensor.
        places: `[nnz]` int32, or int64 from 2³¹ elements; flat, ascending.
        values: `[nnz]` bfloat16 or float16.
    """

    shape: tuple[int, ...]
    places: torch.Tensor
    values: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.places.nbytes + self.values.nbytes

    @property
    def device(self) -> torch.device:
        return self.values.device


PackedDelta = BitPlanes | SparseRows | ByteLists | DenseValues
"""One tensor of an expert on one device, as mixed mode reads it. Made by `pack`; identity is the object's."""

LoadedDelta = PackedDelta | Overwrites
"""One tensor of an expert on one device, whichever mode can use it."""

Term = tuple[float, PackedDelta]
"""A weight of the mix and the delta it is for."""

LoadedTerm = tuple[float, LoadedDelta]
"""The same of what can only be merged, too."""


@dataclass(frozen=True, eq=False)
class Group:
    """Rows `start` to `stop` (exclusive) of a batch that get the same deltas.

    A caller that keeps its groups from step to step saves the work of preparing them.
    """

    start: int
    stop: int
    terms: tuple[Term, ...]


class Kernels(Protocol):
    """One implementation of the arithmetic of mixed mode. Safe to call from any one thread at a time."""

    @property
    def name(self) -> str: ...

    @property
    def fuse_rows(self) -> int | None:
        """Rows of a group from which `fused_linear` is faster than the base's product and `add_linear`; None: never."""
        ...

    @property
    def lanes(self) -> int:
        """Of the lists that it reads fastest, see `pack`; final once `prepare` has been called."""
        ...

    @property
    def lists_below(self) -> float:
        """The density per digit below which it reads lists faster than planes; final once `prepare` has been called."""
        ...

    def prepare(self, dtype: torch.dtype, device: torch.device) -> None:
        """Do now what would hold up the first calls on weights of that type; may take many seconds."""
        ...

    def add_linear(self, y: torch.Tensor, x: torch.Tensor, groups: Sequence[Group]) -> None:
        """In place: `y[i] += Σ_k weight_k · (x[i] @ Δ_kᵀ)` for the rows i of each group.

        Summed in float32 and rounded to `y`'s dtype once per group. Rows in no group are not touched.

        Args:
            y: `[rows, out]`, float32, bfloat16 or float16, contiguous.
            x: `[rows, in]`, of `y`'s dtype and on its device, contiguous.
            groups: disjoint, within the rows; every delta has the shape `(out, in)` and lies on the same device.
        """
        ...

    def fused_linear(
        self, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, groups: Sequence[Group]
    ) -> None:
        """`y[i] ← x[i] @ (W + Σ_k weight_k · Δ_k)ᵀ + bias` for the rows i of each group, in place of two products.

        The moved weights are what `merge` makes of them: summed in float32, rounded to their dtype once. Rows in no
        group are not touched.

        Args:
            y, x: as for `add_linear`; what y held does not matter.
            weight: `[out, in]`, of y's dtype and on its device, contiguous.
            bias: `[out]`, of y's dtype; None is zero.
            groups: as for `add_linear`, each with at least one term.
        """
        ...

    def merge(self, out: torch.Tensor, pristine: torch.Tensor, terms: Sequence[LoadedTerm]) -> None:
        """`out ← pristine + Σ weight·delta`, summed in float32 and rounded to `out`'s dtype once (methods §2, Eq. 5);
        what overwrites alone, at weight 1, is set.

        Bit for bit what `server.engine.kernels.merging.merge_tensor_reference` makes, but for the sign of zeros.

        Args:
            out, pristine: contiguous, of one shape, dtype (float32, bfloat16 or float16) and device; may not overlap.
            terms: at least one; every delta has that shape and lies on that device.
        """
        ...

    def transcode(self, name: str, tensor: PackedTernary, device: torch.device) -> PackedDelta:
        """`pack(tensor.decode(name), device, self.lanes, self.lists_below)`, bit for bit; on the device, where an
        implementation can.

        May be called while another thread uses the other methods, but in Triton's interpreter.

        Args:
            tensor: as it is stored. Where a device decodes, bits that say nothing need not be zeros.

        Raises:
            ExpertFileError: its bytes are not what its counts promise.
        """
        ...


def rows_and_columns(shape: tuple[int, ...]) -> tuple[int, int]:
    """A tensor as a matrix: leading dimensions count as rows; a vector is one row."""
    return (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)


def piece_width(columns: int) -> int:
    """Into how wide pieces `ByteLists` cuts so many columns: as few as possible, of one width."""
    return -(-columns // -(-columns // PIECE))
