"""The container: which tensors a safetensors file holds, and where. Every rule of the format is checked.

Layout (https://github.com/huggingface/safetensors): little-endian u64 header length, JSON header, data. The header maps
each tensor name to its dtype, shape and byte range within the data; `__metadata__` maps strings to strings.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from typing import BinaryIO

from store.strict_json import FieldError, Fields, parse_json

DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
MAX_RANK = 8
MAX_NUMEL = 1 << 38
"""Far above any real tensor, low enough that no product of counts in this package overflows 64 bits."""
MAX_NAME_BYTES = 512
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class TensorSpan:
    """One tensor of a file: dtype word of safetensors, shape, and its bytes `[start, stop)` from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class TensorTable:
    """The header of a safetensors file. `tensors` is in the order of the data; `data_bytes` is the data's size."""

    tensors: dict[str, TensorSpan]
    metadata: dict[str, str]
    data_bytes: int


def read_tensor_table(file: BinaryIO, *, max_header: int) -> TensorTable:
    """Read and check the header of an open safetensors file.

    Checked: header length against `max_header` (bytes) and the file before anything is parsed; JSON without
    duplicate names; known dtypes; byte ranges that fit dtype and shape and together cover the data exactly, without
    gap or overlap.

    Raises:
        FieldError: `field` is the tensor at fault, or "header".
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    prefix = file.read(8)
    if len(prefix) < 8:
        raise FieldError("is too short to be a safetensors file", "header")
    (length,) = struct.unpack("<Q", prefix)
    if length > max_header:
        raise FieldError(f"is {length} bytes long; at most {max_header} are allowed", "header")
    if 8 + length > size:
        raise FieldError("ends beyond the end of the file: the file is cut short or not safetensors", "header")
    raw = file.read(length)
    if len(raw) != length or not raw.startswith(b"{"):
        raise FieldError("must be a JSON object: this is not a safetensors file", "header")
    fields = Fields(parse_json(raw, "header"), "header")
    metadata = _metadata(fields) if fields.has("__metadata__") else {}
    data_start = 8 + length
    spans = [(name, _span(fields, name, data_start, size)) for name in fields.names() if name != "__metadata__"]
    spans.sort(key=lambda item: (item[1].start, item[1].stop))
    end = data_start
    for name, span in spans:
        if span.start != end:
            raise FieldError("has data that overlaps another tensor's or leaves a gap before it", name)
        end = span.stop
    if end != size:
        raise FieldError(f"describes {end} bytes, the file has {size}: it is cut short or has bytes appended", "header")
    return TensorTable(dict(spans), metadata, size - data_start)


def _metadata(fields: Fields) -> dict[str, str]:
    values = fields.child("__metadata__")
    limit = 1 << 30  # the header as a whole is bounded already
    return {key: values.text(key, max_bytes=limit) for key in values.names()}


def _span(fields: Fields, name: str, data_start: int, size: int) -> TensorSpan:
    if not 0 < len(name.encode("utf-8")) <= MAX_NAME_BYTES:
        raise FieldError(f"has a tensor name that is empty or longer than {MAX_NAME_BYTES} bytes", "header")
    try:
        entry = Fields(fields.get(name), name)
        if set(entry.names()) != _ENTRY_KEYS:
            raise FieldError(f"must have exactly the keys {', '.join(sorted(_ENTRY_KEYS))}", name)
        dtype = entry.text("dtype", max_bytes=16)
        if dtype not in DTYPE_BYTES:
            raise FieldError(f"has the unknown dtype {dtype}", name)
        shape = entry.shape("shape", max_rank=MAX_RANK, max_numel=MAX_NUMEL)
        offsets = entry.items("data_offsets", max_items=2)
    except FieldError as error:
        where = "" if error.field == name else f"{error.field} "
        raise FieldError(where + error.message, name) from None
    if len(offsets) != 2 or not all(type(offset) is int for offset in offsets):
        raise FieldError("data_offsets must be two integers", name)
    begin, end = (int(str(offset)) for offset in offsets)
    if not 0 <= begin <= end <= size - data_start:
        raise FieldError("data_offsets lie outside the file: it is cut short or damaged", name)
    span = TensorSpan(dtype, shape, data_start + begin, data_start + end)
    if span.nbytes != span.numel * DTYPE_BYTES[dtype]:
        raise FieldError(f"has {span.nbytes} bytes of data, its dtype and shape ask for another number", name)
    return span
