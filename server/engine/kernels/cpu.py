"""The kernels of `native.cpp`, `merge.cpp` and `decode.cpp`, called from Python."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch

from server.engine.kernels import build
from server.engine.kernels.build import BuildError
from server.engine.kernels.byte_lists import ABREAST, IN_BYTES
from server.engine.kernels.decoding import Decoder
from server.engine.kernels.packing import SPARSE_BELOW, pack
from server.engine.kernels.reference import ReferenceKernels, multiply_merged
from server.engine.kernels.trial import computes_rightly
from server.engine.kernels.types import (
    BitPlanes,
    ByteLists,
    DenseValues,
    Group,
    LoadedDelta,
    LoadedTerm,
    Overwrites,
    PackedDelta,
    SparseRows,
    rows_and_columns,
)
from store.deltas import OverwriteDelta
from store.packed import PackedOverwrite, PackedTernary

TERM = np.dtype(
    [
        *(("start", "i8"), ("stop", "i8"), ("form", "i4"), ("opens", "i4"), ("factor", "f4"), ("count", "i4")),
        *((name, "u8") for name in ("words", "order", "starts", "entries", "levels")),
    ]
)
"""`Term` of native.hpp: rows, form, whether it opens a group, weight of the mix · scale, how many digits or entries,
addresses or 0."""
_TERM = struct.Struct("<qqiifi5Q")

Fields = tuple[int, int, int, int, float, int, int, int, int, int, int]

_LISTS_BELOW_BYTES, _LISTS_BELOW_TILES = 0.15, 0.06
"""Where lists are in bytes. Eight rows of SmolLM2 on two cores of a Zen 4 take 7.6 ms more than the base's step at
density 0.12 on eight experts, with planes 11.1, and all on one 4.3, with planes 7.5; at 0.2 planes are faster. Where
planes are multiplied as tiles they begin earlier: rows that share them cost next to nothing."""

_MERGED = {torch.float32: 0, torch.bfloat16: 1}
"""What `merge.cpp` merges into; the others are left to torch."""
_PLANES, _SPARSE, _ABREAST, _DENSE, _OVERWRITES, _IN_BYTES = range(6)
"""`Form` of native.hpp; two of them are merged only."""


class CpuKernels:
    """Sums by table lookup, driven by the planes themselves; see `native.cpp`.

    What is not float32 is widened for the call. Dense deltas are left to torch, which multiplies them no slower.

    Raises:
        BuildError: the library cannot be built here, or computes wrongly.
    """

    name = "cpu"
    fuse_rows: int | None = None
    lanes = ABREAST
    lists_below = SPARSE_BELOW

    def __init__(self, cache_dir: Path, *, flags: tuple[str, ...] = ()) -> None:
        library = build.load(cache_dir, flags=flags)
        self._add = library.switchyard_add_linear
        self._add.restype = None
        self._add.argtypes = (
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64),
            *(ctypes.c_char_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int),
        )
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self._merge = library.switchyard_merge
        self._merge.restype = None
        self._merge.argtypes = (pointer, pointer, size, size, ctypes.c_int, ctypes.c_char_p, size, ctypes.c_int)
        self.masks = bool(library.switchyard_merge_masks())
        """Whether merging takes words of planes as masks of vector instructions."""
        self.parallel = bool(library.switchyard_parallel())
        self.plane_bytes = bool(library.switchyard_plane_bytes())
        """Whether planes are multiplied as bytes where x may be rounded."""
        self.plane_tiles = bool(library.switchyard_plane_tiles())
        """Whether these are tiles."""
        self.permute = int(library.switchyard_permute())
        """Entries of the table that one vector instruction looks up; 0 where there is none."""
        self._step = library.switchyard_step
        self._step.restype = ctypes.c_double
        self._step.argtypes = (pointer, size, size, *[pointer] * 4, size, ctypes.c_int)
        library.switchyard_operation_bytes.restype = size
        self.operation_bytes = int(library.switchyard_operation_bytes())
        """Of a record of `step`."""
        self._decoder = Decoder(library)
        self._plain = ReferenceKernels()
        self._terms: WeakKeyDictionary[PackedDelta, Fields] = WeakKeyDictionary()
        self._records: WeakKeyDictionary[Group, tuple[tuple[int, ...], bytes]] = WeakKeyDictionary()
        if not all(computes_rightly(self, dtype, torch.device("cpu")) for dtype in (torch.float32, torch.bfloat16)):
            raise BuildError("what the compiler made computes wrongly on this machine")

    def prepare(self, dtype: torch.dtype, device: torch.device) -> None:  # noqa: ARG002 (there is but one)
        if self.plane_bytes and dtype is not torch.float32:
            self.lanes = IN_BYTES
            self.lists_below = _LISTS_BELOW_TILES if self.plane_tiles else _LISTS_BELOW_BYTES

    def add_linear(self, y: torch.Tensor, x: torch.Tensor, groups: Sequence[Group]) -> None:
        if y.dtype is torch.float32:
            self._add_linear(y, x, groups, coarse=False)
            return
        wide = y.float()
        self.add_coarsely(wide, x.float(), groups)
        y.copy_(wide)

    def add_coarsely(self, y: torch.Tensor, x: torch.Tensor, groups: Sequence[Group]) -> None:
        """`add_linear` in float32 of an x that may be rounded to 16 bits of its row's largest number.

        Steps whose activations are bfloat16, or are rounded to it, do the same.
        """
        self._add_linear(y, x, groups, coarse=True)

    def _add_linear(self, y: torch.Tensor, x: torch.Tensor, groups: Sequence[Group], *, coarse: bool) -> None:
        rows, shape = y.shape[0], (y.shape[1], x.shape[1])
        if not (y.is_contiguous() and x.is_contiguous() and x.dtype is torch.float32 and x.shape[0] == rows):
            raise ValueError("y and x must be contiguous, of one dtype, and have the same rows")
        for group in groups:
            if not 0 <= group.start <= group.stop <= rows:
                raise ValueError(f"the group [{group.start}, {group.stop}) is not within {rows} rows")
        joined = self._joined(groups, shape)
        if joined:
            count = len(joined) // _TERM.size
            self._add(y.data_ptr(), x.data_ptr(), *shape, joined, count, coarse, torch.get_num_threads())
        for group in groups:
            if any(isinstance(delta, DenseValues) for _, delta in group.terms):
                dense = tuple(term for term in group.terms if isinstance(term[1], DenseValues))
                self._plain.add_linear(y, x, [Group(group.start, group.stop, dense)])

    def term(self, delta: BitPlanes | SparseRows | ByteLists) -> Fields:
        """A `TERM` of a delta alone, for no rows; its addresses are good as long as the delta is."""
        known = self._terms.get(delta)
        if known is None:
            if isinstance(delta, BitPlanes):
                known = (0, 0, _PLANES, 1, delta.scale, delta.digits, delta.words.data_ptr(), 0, 0, 0, 0)
            else:
                levels = 0 if delta.levels is None else delta.levels.data_ptr()
                lists = (delta.starts.data_ptr(), delta.entries.data_ptr(), levels)
                if isinstance(delta, ByteLists):
                    form, first = _IN_BYTES, (delta.pieces.data_ptr(), delta.places.data_ptr())
                else:
                    form, first = _SPARSE if delta.lanes == 1 else _ABREAST, (0, delta.order.data_ptr())
                known = (0, 0, form, 1, delta.scale, len(delta.entries), *first, *lists)
            self._terms[delta] = known
        return known

    def step(
        self,
        operations: npt.NDArray[np.void],
        positions: npt.NDArray[np.int64],
        slots: npt.NDArray[np.int64],
        sequences: npt.NDArray[np.int64],
        tables: npt.NDArray[np.int32],
        threads: int,
    ) -> float:
        """Go through the operations of a step (`server.engine.programs`), whose addresses and sizes must be right.

        Args:
            operations: `RECORD`s.
            positions, slots, sequences: `[rows]`: where in its sequence and in the cache each row is, and its table.
            tables: `[sequences, blocks]`.

        Returns:
            Seconds spent on what experts add.
        """
        rows = (positions.ctypes.data, slots.ctypes.data, sequences.ctypes.data, tables.ctypes.data)
        taken: float = self._step(
            operations.ctypes.data, len(operations), len(positions), *rows, tables.shape[1], threads
        )
        return taken

    def fused_linear(
        self, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, groups: Sequence[Group]
    ) -> None:
        multiply_merged(self.merge, y, x, weight, bias, groups)

    def transcode(self, name: str, tensor: PackedTernary, device: torch.device) -> PackedDelta:
        made = self._decoder.decode(tensor, self.lists_below, self.lanes) if device.type == "cpu" else None
        return pack(tensor.decode(name), device, self.lanes, self.lists_below) if made is None else made

    def decode_overwrite(self, name: str, tensor: PackedOverwrite) -> OverwriteDelta:
        """`tensor.decode(name)`, bit for bit."""
        return self._decoder.decode_overwrite(tensor) or tensor.decode(name)

    def merge(self, out: torch.Tensor, pristine: torch.Tensor, terms: Sequence[LoadedTerm]) -> None:
        form = _MERGED.get(out.dtype)
        if form is None or not all(_is_merged(delta) for _, delta in terms):
            self._plain.merge(out, pristine, terms)
            return
        same = all(delta.shape == out.shape for _, delta in terms)
        if not (out.is_contiguous() and pristine.is_contiguous() and out.shape == pristine.shape and same):
            raise ValueError("out, pristine and the deltas must be contiguous and of one shape")
        records = b"".join(self._merged_term(weight, delta) for weight, delta in terms)
        where = (out.data_ptr(), pristine.data_ptr(), *rows_and_columns(tuple(out.shape)), form)
        self._merge(*where, records, len(terms), torch.get_num_threads())

    def _merged_term(self, weight: float, delta: LoadedDelta) -> bytes:
        if isinstance(delta, BitPlanes | SparseRows | ByteLists):
            start, stop, form, opens, scale, *others = self.term(delta)
            return _TERM.pack(start, stop, form, opens, _single(weight * scale), *others)
        if isinstance(delta, DenseValues):
            return _TERM.pack(0, 0, _DENSE, 1, _single(weight), 0, delta.values.data_ptr(), 0, 0, 0, 0)
        places, values = delta.places.data_ptr(), delta.values.data_ptr()
        return _TERM.pack(0, 0, _OVERWRITES, 1, _single(weight), len(delta.places), places, 0, 0, values, 0)

    def _joined(self, groups: Sequence[Group], shape: tuple[int, int]) -> bytes:
        records = []
        for group in groups:
            known = self._records.get(group)
            if known is None or known[0] != shape:
                known = shape, self._record(group, shape)
                self._records[group] = known
            records.append(known[1])
        return b"".join(records)

    def _record(self, group: Group, shape: tuple[int, int]) -> bytes:
        """The terms of a group as `native.cpp` reads them; those that it computes."""
        parts: list[bytes] = []
        if group.start == group.stop:
            return b""
        for weight, delta in group.terms:
            if rows_and_columns(delta.shape) != shape:
                raise ValueError(f"a delta of shape {delta.shape} cannot be applied to {shape[1]} → {shape[0]}")
            if isinstance(delta, DenseValues):
                continue
            _, _, form, _, scale, *others = self.term(delta)
            parts.append(_TERM.pack(group.start, group.stop, form, not parts, weight * scale, *others))
        return b"".join(parts)


def _is_merged(delta: LoadedDelta) -> bool:
    """Whether `merge.cpp` reads it."""
    if isinstance(delta, Overwrites):
        return delta.places.dtype is torch.int32 and delta.values.dtype is torch.bfloat16
    return not isinstance(delta, DenseValues) or (delta.values.is_contiguous() and delta.values.dtype is torch.float32)


def _single(value: float) -> float:
    """Rounded to 32 bits, to an infinity where it is too large, which `struct` refuses to do."""
    return ctypes.c_float(value).value
