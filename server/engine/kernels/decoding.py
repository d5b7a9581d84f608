"""Stored tensors → what the engine keeps, with `decode.cpp`: what the codecs write for matrices and overwrites."""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from server.engine.kernels.byte_lists import ABREAST, MOST_COLUMNS, most_vectors
from server.engine.kernels.packing import SPARSE_BELOW, below_beside, form_of
from server.engine.kernels.types import BLOCK, BitPlanes, ByteLists, SparseRows, rows_and_columns
from store.deltas import OverwriteDelta
from store.encodings import MAX_LEVEL
from store.packed import LARGEST, PackedLevels, PackedOverwrite, PackedTernary
from store.positions import BITMAP, MAX_K, MIN_K, RICE, RICE_ZEROS

_LAYOUTS = {BITMAP: 0, RICE: 1, RICE_ZEROS: 2}
_MOST = 2**31
"""Elements of a tensor, exclusive: places in lists are int32."""


class Decoder:
    """The functions of `decode.cpp` in a library. They let go of the interpreter's lock, and need no more memory than
    for one tensor's streams, its bitmap and a few bytes per nonzero, which each thread keeps."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        common = (ctypes.c_char_p, size, number, number, size)
        self._planes, self._sparse = library.switchyard_decode_planes, library.switchyard_decode_sparse
        self._bytes, self._steps = library.switchyard_decode_bytes, library.switchyard_decode_steps
        self._planes.argtypes = (*common, size, size, size, number, number, pointer)
        self._sparse.argtypes = (*common, size, size, size, number, *[pointer] * 4)
        self._bytes.argtypes = (*common, size, size, size, number, size, *[pointer] * 5)
        self._bytes.restype = size
        self._steps.argtypes = (*common, size, size, size, pointer, pointer)

    def decode(
        self, tensor: PackedTernary, lists_below: float = SPARSE_BELOW, lanes: int = ABREAST
    ) -> BitPlanes | SparseRows | ByteLists | None:
        """`pack(tensor.decode(...), lanes=lanes, lists_below=lists_below)`, bit for bit.

        Args:
            lanes: `ABREAST` or `IN_BYTES`.

        Returns:
            None where only `tensor.decode` will do: vectors, layouts that are not known here, and whatever is damaged,
            which it refuses with a message.
        """
        shape, params = tensor.shape, tensor.encoded.params
        has_levels = isinstance(tensor, PackedLevels)
        payload = _payload(tensor, ("values",), {"top"}) if has_levels else _payload(tensor, (), set())
        if payload is None:
            return None
        values, top = (params["values"], params["top"]) if has_levels else (-1, 1)
        if not (1 <= top <= MAX_LEVEL and tensor.scale * top <= LARGEST):
            return None
        rows, columns = rows_and_columns(shape)
        form = form_of(shape, tensor.nnz, top, lists_below, lanes)
        if form is ByteLists:
            made = self._in_bytes(tensor, payload, (rows, columns), values, top)
            if made is not None:
                return made
            form = form_of(shape, tensor.nnz, top, below_beside(lists_below))
        if form is BitPlanes:
            digits = next(digits for digits in range(1, 7) if 3**digits // 2 >= top)
            words = torch.empty(-(-rows // BLOCK), digits, -(-columns // BLOCK), 2, BLOCK, dtype=torch.int32)
            good = self._planes(*payload, rows, columns, values, top, digits, words.data_ptr())
            return BitPlanes(shape, tensor.scale, words) if good else None
        if form is SparseRows:
            order, starts = torch.empty(rows, dtype=torch.int32), torch.empty(rows + 1, dtype=torch.int32)
            entries = torch.empty(tensor.nnz, dtype=torch.int16)
            levels = torch.empty(tensor.nnz, dtype=torch.uint8) if top > 1 else None
            parts = (order, starts, entries, levels)
            good = self._sparse(*payload, rows, columns, values, top, *_addresses(parts))
            return SparseRows(shape, tensor.scale, *parts, ABREAST) if good else None
        return None

    def _in_bytes(
        self,
        tensor: PackedTernary,
        payload: tuple[bytes, int, int, int, int],
        size: tuple[int, int],
        values: int,
        top: int,
    ) -> ByteLists | None:
        """None where `pack` makes none, or the payload is damaged."""
        (rows, columns), most = size, most_vectors(size[0], tensor.nnz)
        if columns > MOST_COLUMNS:
            return None
        blocks = -(-rows // BLOCK)
        places, starts = torch.empty(BLOCK * blocks, dtype=torch.uint8), torch.empty(2 * blocks + 1, dtype=torch.int32)
        pieces, entries = torch.empty(most, dtype=torch.uint8), torch.empty(most, ABREAST, 4, dtype=torch.uint8)
        levels = torch.empty_like(entries) if top > 1 else None
        parts = (places, starts, pieces, entries, levels)
        vectors = self._bytes(*payload, rows, columns, values, top, most, *_addresses(parts))
        if vectors <= 0:
            return None
        used = (pieces[:vectors], entries[:vectors], None if levels is None else levels[:vectors])
        return ByteLists(tensor.shape, tensor.scale, places, starts, *used)

    def decode_overwrite(self, tensor: PackedOverwrite) -> OverwriteDelta | None:
        """`tensor.decode(...)`, bit for bit; None where only that will do, as `decode` says."""
        payload = _payload(tensor, ("high", "low"), set())
        if payload is None:
            return None
        high, low = (tensor.encoded.params[name] for name in ("high", "low"))
        indices, steps = np.empty(tensor.nnz, np.int32), np.empty(tensor.nnz, np.int16)
        good = self._steps(*payload, tensor.numel, high, low, indices.ctypes.data, steps.ctypes.data)
        return OverwriteDelta(tensor.shape, indices, steps, tensor.half, tensor.sha256) if good else None


def _addresses(parts: tuple[torch.Tensor | None, ...]) -> list[int | None]:
    return [None if part is None else part.data_ptr() for part in parts]


def _payload(
    tensor: PackedTernary | PackedOverwrite, lengths: tuple[str, ...], others: set[str]
) -> tuple[bytes, int, int, int, int] | None:
    """The payload, its length, layout and parameter, and how many nonzeros it has; None if it is none of ours.

    Args:
        lengths: the parameters that are bytes of streams of values, at most all of the payload.
        others: the parameters that are none of the layout's either.
    """
    name, params, payload = tensor.encoded.name, tensor.encoded.params, tensor.encoded.payload
    layout, k = _LAYOUTS.get(name), params.get("k", MIN_K)
    if layout is None or params.keys() != {*lengths, *others, *(() if name == BITMAP else ("k",))}:
        return None
    if not MIN_K <= k <= MAX_K or not 0 < tensor.nnz <= tensor.numel < _MOST:
        return None
    if not all(0 <= params[length] <= len(payload) for length in lengths):
        return None
    return payload, len(payload), layout, k, tensor.nnz
