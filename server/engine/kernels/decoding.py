"""Stored tensors → packed deltas with `decode.cpp`: what the codecs write for ternary matrices."""

from __future__ import annotations

import ctypes

import torch

from server.engine.kernels.packing import SPARSE_BELOW, form_of
from server.engine.kernels.types import BLOCK, BitPlanes, SparseRows, rows_and_columns
from store.packed import PackedLevels, PackedTernary
from store.positions import BITMAP, MAX_K, MIN_K, RICE, RICE_ZEROS

_LAYOUTS = {BITMAP: 0, RICE: 1, RICE_ZEROS: 2}
LANES = 16
"""Lists that `decode.cpp` lays abreast."""
_MOST = 2**31
"""Elements of a tensor, exclusive: places in lists are int32."""


class Decoder:
    """The functions of `decode.cpp` in a library. They let go of the interpreter's lock, and need no more than memory
    for one tensor's streams and bitmap, which each thread keeps."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        common = (ctypes.c_char_p, size, ctypes.c_int, ctypes.c_int, size, size, size)
        self._planes, self._sparse = library.switchyard_decode_planes, library.switchyard_decode_sparse
        self._planes.argtypes = (*common, pointer)
        self._sparse.argtypes = (*common, pointer, pointer, pointer)

    def decode(self, tensor: PackedTernary, lists_below: float = SPARSE_BELOW) -> BitPlanes | SparseRows | None:
        """`pack(tensor.decode(...), lanes=LANES, lists_below=lists_below)`, bit for bit.

        Returns:
            None where only `tensor.decode` will do: levels other than ±1, vectors, layouts that are not known here,
            and whatever is damaged, which it refuses with a message.
        """
        encoded, shape = tensor.encoded, tensor.shape
        layout, k = _LAYOUTS.get(encoded.name), encoded.params.get("k", MIN_K)
        expected = set() if layout == 0 else {"k"}
        if layout is None or encoded.params.keys() != expected or not MIN_K <= k <= MAX_K:
            return None
        if isinstance(tensor, PackedLevels) or not 0 < tensor.nnz <= tensor.numel < _MOST:
            return None
        rows, columns = rows_and_columns(shape)
        payload = (encoded.payload, len(encoded.payload), layout, k, tensor.nnz, rows, columns)
        form = form_of(shape, tensor.nnz, 1, lists_below)
        if form is BitPlanes:
            words = torch.empty(-(-rows // BLOCK), 1, -(-columns // BLOCK), 2, BLOCK, dtype=torch.int32)
            good = self._planes(*payload, words.data_ptr())
            return BitPlanes(shape, tensor.scale, words) if good else None
        if form is SparseRows:
            order, starts = torch.empty(rows, dtype=torch.int32), torch.empty(rows + 1, dtype=torch.int32)
            entries = torch.empty(tensor.nnz, dtype=torch.int16)
            good = self._sparse(*payload, order.data_ptr(), starts.data_ptr(), entries.data_ptr())
            return SparseRows(shape, tensor.scale, order, starts, entries, None, LANES) if good else None
        return None
