"""A stream of bytes whose values are unevenly likely, near its entropy. NumPy only; no torch.

A wavelet tree: the root says of every symbol whether its highest bit is set, its two children say the same of the next
bit for the symbols on either side, and so on. Each node is a subset of its symbols, laid out as `store.positions` does,
so each comes within a few per cent of its entropy, and by the chain rule so does the whole; and since a node is array
arithmetic, so is the tree. Where nothing is gained below a node, the bits that are left follow as they are.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from store.bits import Bytes, bytes_for, check_padding, fail, pack_values, unpack_values
from store.positions import BITMAP, MAX_K, MIN_K, RICE, RICE_ZEROS, Layout, decode_positions, encode_positions

Symbols = npt.NDArray[np.uint8]

MAX_WIDTH = 8
_NONE, _ALL, _BITMAP, _PLAIN = 0x00, 0x01, 0x02, 0x03
"""The first byte of a node: no bit is set, every bit is, a bitmap follows, or all the bits that are left do."""
_RICE, _RICE_ZEROS = 0x20, 0x40
"""The first byte of a node in Rice code: one of these plus k."""


def encode_symbols(symbols: Symbols) -> bytes:
    """Encode a one-dimensional array of bytes: the bits of the largest, then the root."""
    width = int(symbols.max()).bit_length() if len(symbols) else 0
    return bytes([width]) + _encode_node(symbols, width)


def decode_symbols(payload: Bytes, count: int, tensor: str) -> Symbols:
    """Recover `count` symbols. The payload may be hostile; it must hold exactly that many.

    Raises:
        ExpertFileError: it does not; `param` is the tensor.
    """
    reader = _Reader(payload, tensor)
    width = int(reader.take(1)[0])
    if width > MAX_WIDTH:
        fail(tensor, f"has values of {width} bits; at most {MAX_WIDTH} are allowed")
    symbols = _decode_node(reader, count, width)
    if reader.place != len(payload):
        fail(tensor, "has bytes after the last of its values")
    return symbols


def _encode_node(symbols: Symbols, width: int) -> bytes:
    """The shorter of a split at the highest of `width` bits and the bits as they are."""
    if not width or not len(symbols):
        return b""
    is_set = (symbols >> (width - 1) & 1).view(np.bool_)
    split = _encode_mask(is_set) + _encode_node(symbols[~is_set], width - 1) + _encode_node(symbols[is_set], width - 1)
    if 1 + bytes_for(len(symbols) * width) >= len(split):
        return split
    return bytes([_PLAIN]) + pack_values(symbols & np.uint8((1 << width) - 1), width).tobytes()


def _encode_mask(is_set: npt.NDArray[np.bool_]) -> bytes:
    positions = np.flatnonzero(is_set)
    if len(positions) in (0, len(is_set)):
        return bytes([_ALL if len(positions) else _NONE])
    layout, payload = encode_positions(positions, len(is_set))
    if layout.name == BITMAP:
        return bytes([_BITMAP]) + payload
    mark = (_RICE if layout.name == RICE else _RICE_ZEROS) + layout.params["k"]
    return bytes([mark]) + _number(len(payload)) + _number(len(positions)) + payload


class _Reader:
    """Takes a stream apart, never beyond its end."""

    def __init__(self, stream: Bytes, tensor: str) -> None:
        self._stream = stream
        self.tensor = tensor
        self.place = 0

    def take(self, count: int) -> Bytes:
        if self.place + count > len(self._stream):
            fail(self.tensor, "has a stream of values that ends early")
        self.place += count
        return self._stream[self.place - count : self.place]

    def number(self) -> int:
        """An unsigned LEB128 number of at most 6 bytes."""
        value = 0
        for place in range(6):
            byte = int(self.take(1)[0])
            value |= (byte & 0x7F) << 7 * place
            if byte < 0x80:
                return value
        fail(self.tensor, "has a number of more than 6 bytes in its values")


def _number(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _decode_node(reader: _Reader, count: int, width: int) -> Symbols:
    if not width or not count:
        return np.zeros(count, dtype=np.uint8)
    mark = int(reader.take(1)[0])
    if mark == _PLAIN:
        stream = reader.take(bytes_for(count * width))
        check_padding(stream, count * width, reader.tensor, "values")
        return unpack_values(stream, width, 0, count).astype(np.uint8)
    high = np.uint8(1 << (width - 1))
    if mark in (_NONE, _ALL):
        return _decode_node(reader, count, width - 1) | (high if mark == _ALL else np.uint8(0))
    is_set = _decode_mask(reader, mark, count)
    if width == 1:  # nothing below: the mask is the symbols
        return is_set.view(np.uint8)
    ones = int(np.count_nonzero(is_set))
    symbols = np.empty(count, dtype=np.uint8)
    symbols[~is_set] = _decode_node(reader, count - ones, width - 1)
    symbols[is_set] = _decode_node(reader, ones, width - 1) | high
    return symbols


def _decode_mask(reader: _Reader, mark: int, count: int) -> npt.NDArray[np.bool_]:
    if mark == _BITMAP:
        stream = reader.take(bytes_for(count))
        check_padding(stream, count, reader.tensor, "values")
        return np.unpackbits(stream, count=count, bitorder="little").view(np.bool_)
    if _RICE + MIN_K <= mark <= _RICE + MAX_K:
        layout = Layout(RICE, {"k": mark - _RICE})
    elif _RICE_ZEROS + MIN_K <= mark <= _RICE_ZEROS + MAX_K:
        layout = Layout(RICE_ZEROS, {"k": mark - _RICE_ZEROS})
    else:
        fail(reader.tensor, f"has the unknown mark {mark} in its values")
    length, ones = reader.number(), reader.number()
    if ones > count:
        fail(reader.tensor, f"claims {ones} of {count} in its values")
    is_set = np.zeros(count, dtype=np.bool_)
    is_set[decode_positions(layout, reader.take(length), nnz=ones, numel=count, tensor=reader.tensor)] = True
    return is_set
