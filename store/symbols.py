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
from store.positions import BITMAP, MAX_K, MIN_K, RICE, RICE_ZEROS, Layout, decode_positions, encode_mask

Symbols = npt.NDArray[np.uint8]

MAX_WIDTH = 8
_CHUNK = 1 << 16
"""Symbols whose indices are there at a time, 8 bytes each."""
_MANY = 1 << 16
"""Symbols above which a node is encoded by itself."""
_NONE, _ALL, _BITMAP, _PLAIN = 0x00, 0x01, 0x02, 0x03
"""The first byte of a node: no bit is set, every bit is, a bitmap follows, or all the bits that are left do."""
_RICE, _RICE_ZEROS = 0x20, 0x40
"""The first byte of a node in Rice code: one of these plus k."""


def encode_symbols(symbols: Symbols) -> bytes:
    """Encode a one-dimensional array of bytes: the bits of the largest, then the root."""
    width = int(symbols.max()).bit_length() if len(symbols) else 0
    return bytes([width]) + (_encode_node if len(symbols) > _MANY else _encode_levels)(symbols, width)


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
    if not width:
        return b""
    is_set = _bit(symbols, width - 1)
    count = int(np.count_nonzero(is_set))
    split = _encode_mask(is_set, count)
    for part in _parted(is_set, count, symbols):
        split += (_encode_node if len(part) > _MANY else _encode_levels)(part, width - 1)
    plain = 1 + bytes_for(len(symbols) * width)
    return split if plain >= len(split) else _encode_plain(symbols, width)


def _encode_plain(symbols: Symbols, width: int) -> bytes:
    return bytes([_PLAIN]) + pack_values(symbols & np.uint8((1 << width) - 1), width).tobytes()


def _encode_mask(is_set: npt.NDArray[np.bool_], count: int) -> bytes:
    """A mask of which so many are set, with its mark."""
    if count in (0, len(is_set)):
        return bytes([_ALL if count else _NONE])
    layout, payload = encode_mask(is_set, count)
    if layout.name == BITMAP:
        return bytes([_BITMAP]) + payload
    mark = (_RICE if layout.name == RICE else _RICE_ZEROS) + layout.params["k"]
    return bytes([mark]) + _number(len(payload)) + _number(count) + payload


def _bit(symbols: Symbols, bit: int) -> npt.NDArray[np.bool_]:
    return (symbols >> np.uint8(bit) & np.uint8(1)).view(np.bool_)


def _parted(is_set: npt.NDArray[np.bool_], count: int, symbols: Symbols) -> tuple[Symbols, Symbols]:
    """The symbols where the mask is not set, and those where it is, which are `count`; each in their order."""
    low, upper = np.empty(len(symbols) - count, dtype=np.uint8), np.empty(count, dtype=np.uint8)
    ones = 0
    for start in range(0, len(is_set), _CHUNK):
        part, mask = symbols[start : start + _CHUNK], is_set[start : start + _CHUNK]
        # NumPy takes several times as long to follow a mask as to follow indices.
        of_low, of_upper = np.flatnonzero(~mask), np.flatnonzero(mask)
        part.take(of_low, out=low[start - ones : start - ones + len(of_low)], mode="clip")
        part.take(of_upper, out=upper[ones : ones + len(of_upper)], mode="clip")
        ones += len(of_upper)
    return low, upper


class _Level:
    """All nodes of one width, empty ones too, so that the children of node i are 2 i and 2 i + 1 of the next level.

    Args:
        bit: what the masks are of; one less than the width.
        symbols: those of the first node, then those of the second and so on.
        bounds: `[nodes + 1]`, where each begins.
        ones: `[nodes]`, how many symbols have the bit.

    Attributes:
        masks: of some nodes, which are no bitmaps.
        sizes: `[nodes]`, bytes of the masks; of whole nodes after `choose`.
        is_plain: `[nodes]`, whether there is none, but the bits as they are.
    """

    def __init__(self, bit: int, symbols: Symbols, bounds: npt.NDArray[np.int64], ones: npt.NDArray[np.int64]) -> None:
        self.bit, self._symbols, self._bounds, self.ones = bit, symbols, bounds, ones
        self._counts = np.diff(bounds)
        self.masks: dict[int, bytes] = {}
        self.sizes = self._counts.clip(max=1)
        self.is_plain = np.zeros(len(ones), dtype=np.bool_)

    def of(self, node: int) -> Symbols:
        """The symbols of a node."""
        return self._symbols[self._bounds[node] : self._bounds[node + 1]]

    def encode_masks(self, nodes: npt.NDArray[np.int64], few: list[npt.NDArray[np.int64]]) -> None:
        """Find the sizes of masks that are neither all nor nothing.

        Args:
            nodes: which they are of.
            few: of each the set bits or the others, whichever are fewer, by their places in the level.
        """
        counts, numbers = self._counts[nodes], np.asarray([len(part) for part in few])
        firsts = np.cumsum(numbers) - numbers
        joined = np.concatenate(few)
        gaps = np.empty_like(joined)
        np.subtract(joined[1:], joined[:-1], out=gaps[1:])
        gaps[firsts] = joined[firsts] - self._bounds[nodes] + 1
        gaps -= 1
        quotients = np.add.reduceat(gaps >> 1, firsts)
        # Where k = 2 is no shorter than k = 1, no k is (see `store.positions`).
        shortest = (numbers + quotients + 7) // 8 + (numbers + 7) // 8
        is_bitmap = (quotients <= numbers) & (shortest >= (counts + 7) // 8)
        self.sizes[nodes] += (counts + 7) // 8
        for node in nodes[~is_bitmap].tolist():
            self.masks[node] = _encode_mask(_bit(self.of(node), self.bit), int(self.ones[node]))
            self.sizes[node] = len(self.masks[node])

    def choose(self, below: npt.NDArray[np.int64]) -> None:
        """The shorter of a split and the bits as they are, given the sizes of the next level's nodes."""
        plain = (self._counts > 0) + (self._counts * (self.bit + 1) + 7) // 8
        self.sizes += below[::2] + below[1::2]
        self.is_plain = plain < self.sizes
        np.minimum(self.sizes, plain, out=self.sizes)


def _encode_levels(symbols: Symbols, width: int) -> bytes:
    """`_encode_node`, a level of nodes at a time: what NumPy takes for a call is more than for some symbols."""
    levels, bounds = [], np.asarray([0, len(symbols)])
    for bit in reversed(range(width)):
        level, symbols, bounds = _split(symbols, bounds, bit)
        levels.append(level)
    below = np.zeros(1 << width, dtype=np.int64)
    for level in reversed(levels):
        level.choose(below)
        below = level.sizes
    return _join(levels, 0, 0)


def _split(symbols: Symbols, bounds: npt.NDArray[np.int64], bit: int) -> tuple[_Level, Symbols, npt.NDArray[np.int64]]:
    """A level of which nothing is chosen yet, and the symbols and bounds of the next."""
    is_set = _bit(symbols, bit)
    zeros, ones = np.flatnonzero(~is_set), np.flatnonzero(is_set)
    low, upper = symbols[zeros], symbols[ones]
    to_ones = np.searchsorted(ones, bounds)
    to_zeros = bounds - to_ones
    below, next_bounds = np.empty_like(symbols), np.empty(2 * len(bounds) - 1, dtype=np.int64)
    next_bounds[::2] = bounds
    next_bounds[1::2] = bounds[:-1] + np.diff(to_zeros)
    few, owners = [], []
    edges, first_zero, first_one = next_bounds.tolist(), to_zeros.tolist(), to_ones.tolist()
    for node in range(len(bounds) - 1):
        start, middle, stop = edges[2 * node : 2 * node + 3]
        of_zeros, of_ones = slice(*first_zero[node : node + 2]), slice(*first_one[node : node + 2])
        below[start:middle] = low[of_zeros]
        below[middle:stop] = upper[of_ones]
        if start < middle < stop:
            few.append(ones[of_ones] if 2 * (stop - middle) <= stop - start else zeros[of_zeros])
            owners.append(node)
    level = _Level(bit, symbols, bounds, np.diff(to_ones))
    if owners:
        level.encode_masks(np.asarray(owners), few)
    return level, below, next_bounds


def _join(levels: list[_Level], depth: int, node: int) -> bytes:
    if depth == len(levels):
        return b""
    level = levels[depth]
    symbols = level.of(node)
    if not len(symbols):
        return b""
    if level.is_plain[node]:
        return _encode_plain(symbols, level.bit + 1)
    if level.ones[node] in (0, len(symbols)):
        mask = bytes([_ALL if level.ones[node] else _NONE])
    else:
        mask = (
            level.masks.get(node)
            or bytes([_BITMAP]) + np.packbits(_bit(symbols, level.bit), bitorder="little").tobytes()
        )
    return mask + _join(levels, depth + 1, 2 * node) + _join(levels, depth + 1, 2 * node + 1)


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
    low = _decode_node(reader, count - ones, width - 1)
    upper = _decode_node(reader, ones, width - 1) | high
    return _interleaved(is_set, low, upper)


def _interleaved(is_set: npt.NDArray[np.bool_], low: Symbols, upper: Symbols) -> Symbols:
    """The symbols of `upper` where the mask is set, those of `low` elsewhere, each in their order."""
    symbols = np.empty(len(is_set), dtype=np.uint8)
    ones = 0
    for start in range(0, len(is_set), _CHUNK):
        part, mask = symbols[start : start + _CHUNK], is_set[start : start + _CHUNK]
        # NumPy takes several times as long to follow a mask as to follow indices.
        to_low, to_upper = np.flatnonzero(~mask), np.flatnonzero(mask)
        part[to_low] = low[start - ones : start - ones + len(to_low)]
        part[to_upper] = upper[ones : ones + len(to_upper)]
        ones += len(to_upper)
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
