"""How an expert file is laid out around its payloads: header and table, plain or compact. NumPy only; no torch.

Plain, the container names every tensor and carries the expert header as text. At hundreds of tensors that is as long
as a small expert's payloads; so a longer header is deflated into the first of two tensors, and the payloads follow
each other in the second. docs/expert-file.md specifies both.
"""

from __future__ import annotations

import json
import math
import random
import struct
import zlib
from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import BinaryIO

import numpy as np

from store.entry_payload import check_span, span_of
from store.expert_header import (
    COMPACT,
    FORMAT_VERSION,
    ExpertHeader,
    TensorEntry,
    TernaryEntry,
    check_version,
    header_from_fields,
    header_to_json,
)
from store.expert_info import ExpertInfo
from store.positions import RICE
from store.strict_json import FieldError, Fields, parse_json
from store.tensor_file import DTYPE_BYTES, TensorSpan, TensorTable, read_tensor_table

MAX_HEADER_BYTES = 1 << 20
PLAIN_BYTES = 2048
"""A header up to that long stays plain, for whoever looks at the file with other tools."""
_METADATA_KEY = "switchyard"
_HEADER, _DATA = "header", "data"
_FIGURES = 512
"""Deflated bytes of what is measured once the payloads are known."""


def laid_out(header: ExpertHeader, sizes: Mapping[str, int]) -> tuple[ExpertHeader, bytes]:
    """The header as it will be read, and all bytes of the file that precede the payloads. Equal arguments give equal
    bytes, with one version of zlib.

    Args:
        header: what to say; its tensors in the order of the payloads.
        sizes: name → bytes of the payload.

    Raises:
        FieldError: the header is longer than a reader accepts.
    """
    table: dict[str, object] = {"__metadata__": {_METADATA_KEY: header_to_json(header)}}
    borders = [0, *accumulate(sizes[name] for name in header.tensors)]
    for (name, entry), (start, stop) in zip(header.tensors.items(), pairwise(borders), strict=True):
        dtype, shape = span_of(entry, stop - start)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
    plain = _container(table)
    if len(plain) <= PLAIN_BYTES:
        return header, plain
    header = replace(header, required_features=tuple(sorted({*header.required_features, COMPACT})))
    text = header_to_json(header, [sizes[name] for name in header.tensors]).encode("utf-8")
    if len(text) > MAX_HEADER_BYTES:
        raise FieldError(
            f"would be {len(text)} bytes long, at most {MAX_HEADER_BYTES} are allowed: give fewer exemplars", "header"
        )
    deflated = zlib.compress(text, 9)
    outer = json.dumps({"format": FORMAT_VERSION, "required_features": [COMPACT]}, separators=(",", ":"))
    table = {"__metadata__": {_METADATA_KEY: outer}}
    borders = [0, len(deflated), len(deflated) + borders[-1]]
    for name, (start, stop) in zip((_HEADER, _DATA), pairwise(borders), strict=True):
        table[name] = {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop]}
    return header, _container(table) + deflated


def _container(table: Mapping[str, object]) -> bytes:
    raw = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def read_layout(file: BinaryIO) -> tuple[ExpertHeader, TensorTable]:
    """The checked header of an open expert file, and where each tensor's payload lies, in the order of the file.

    Raises:
        FieldError: naming the field or the tensor.
    """
    table = read_tensor_table(file, max_header=MAX_HEADER_BYTES)
    text = table.metadata.get(_METADATA_KEY)
    if text is None:
        raise FieldError(
            "has no Switchyard metadata: this is not an expert file; make one with `switchyard compress`", "header"
        )
    fields = _fields(text.encode("utf-8"))
    if COMPACT in check_version(fields):
        fields = _fields(_inflated(file, table))
        if COMPACT not in check_version(fields):
            fields.fail("required_features", f"lacks {COMPACT}, which the file uses")
        header = header_from_fields(fields)
        table = _spread_out(header, fields, table)
    else:
        header = header_from_fields(fields)
        if missing := header.tensors.keys() ^ table.tensors.keys():
            raise FieldError("is not both described and stored", min(missing))
    for name, entry in header.tensors.items():
        check_span(name, entry, table.tensors[name])
    return header, table


def _fields(text: bytes) -> Fields:
    return Fields(parse_json(text, _METADATA_KEY), _METADATA_KEY)


def _inflated(file: BinaryIO, table: TensorTable) -> bytes:
    if list(table.tensors) != [_HEADER, _DATA]:
        raise FieldError(f"must hold the tensors {_HEADER} and {_DATA}, in that order, and no others", "header")
    for name, span in table.tensors.items():
        if span.dtype != "U8" or len(span.shape) != 1:
            raise FieldError(f"is stored as {span.dtype} {list(span.shape)}; it must be U8 with one axis", name)
    span = table.tensors[_HEADER]
    file.seek(span.start)
    stream = zlib.decompressobj()
    try:
        # What is read and what comes out are bounded, whatever the file claims.
        text = stream.decompress(file.read(min(span.nbytes, MAX_HEADER_BYTES)), MAX_HEADER_BYTES + 1)
    except zlib.error:
        raise FieldError("is no zlib stream: the file is damaged", _HEADER) from None
    if not stream.eof or stream.unused_data or max(span.nbytes, len(text)) > MAX_HEADER_BYTES:
        raise FieldError(f"must be one zlib stream, of at most {MAX_HEADER_BYTES} bytes when inflated", _HEADER)
    return text


def _spread_out(header: ExpertHeader, fields: Fields, table: TensorTable) -> TensorTable:
    """The table that names every tensor, from a compact file's."""
    data = table.tensors[_DATA]
    sizes = fields.integers("bytes", max_items=len(header.tensors), high=data.nbytes)
    if len(sizes) != len(header.tensors) or sum(sizes) != data.nbytes:
        fields.fail("bytes", f"must be one size per tensor, {data.nbytes} together")
    borders = accumulate([data.start, *sizes])
    spans: dict[str, TensorSpan] = {}
    for (name, entry), (start, stop) in zip(header.tensors.items(), pairwise(borders), strict=True):
        spans[name] = span = TensorSpan(*span_of(entry, stop - start), start, stop)
        if span.nbytes != span.numel * DTYPE_BYTES[span.dtype]:
            raise FieldError(f"has {span.nbytes} bytes of data, its shape asks for another number", name)
    return TensorTable(spans, table.metadata, data.nbytes)


def header_room(info: ExpertInfo, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes to set aside for all but the payloads of an expert that stores every tensor of a base, sparse: what is
    not known yet is taken to be as long as it can be, and as hard to deflate.

    Args:
        info: what the header will say, but for figures measured later.
        shapes: name → shape, of the base.
    """
    dice = random.Random(0)
    entries: dict[str, TensorEntry] = {}
    sizes: dict[str, int] = {}
    for name, shape in sorted(shapes.items()):
        numel = max(1, math.prod(shape))
        scale = float(np.float32(dice.uniform(1e-4, 1e-3)))
        entries[name] = TernaryEntry(shape, dice.randint(1, numel), RICE, {"k": dice.randint(1, 24)}, scale)
        sizes[name] = dice.randint(1, numel)
    known = vars(info) | {"codec_params": {**info.codec_params, "figures": dice.randbytes(_FIGURES).hex()}}
    header = ExpertHeader(
        **known, base_fingerprint=dice.randbytes(32).hex(), density=0.1, bits_per_param=0.1, tensors=entries
    )
    # One that turns out shorter than expected may stay plain.
    return max(PLAIN_BYTES, len(laid_out(header, sizes)[1]))
