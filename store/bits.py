"""Streams of bits, which the encodings are made of: set, find, pack, check. NumPy only; no torch.

Every stream is little-endian in bits (bit j of a stream is bit j mod 8 of byte j div 8), starts on a byte and is
padded with zero bits.
"""

from __future__ import annotations

from functools import cache
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from store.errors import ExpertFileError

Bytes = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int32] | npt.NDArray[np.int64]

_CHUNK_BITS = 1 << 21
"""Bits expanded to bytes at a time: bounds the memory above the result to a few MB, and stays in cache."""


def fail(tensor: str, fault: str) -> NoReturn:
    """Refuse a payload, naming its tensor."""
    raise ExpertFileError(f"tensor {tensor} {fault}; the file is damaged: create it or upload it again", param=tensor)


def bytes_for(bits: int) -> int:
    """Bytes of a stream of that many bits."""
    return (bits + 7) // 8


def as_indices(positions: Indices, numel: int) -> Indices:
    """Flat positions in the type of a tensor of `numel` elements: int32 below 2³¹ of them, which halves the memory."""
    return positions.astype(np.int32, copy=False) if numel < 2**31 else positions


def set_bits(positions: Indices, nbits: int) -> Bytes:
    """A stream of `nbits` bits that is 1 at the ascending `positions`."""
    stream = np.zeros(bytes_for(nbits), dtype=np.uint8)
    for start in range(0, nbits, _CHUNK_BITS):
        stop = min(start + _CHUNK_BITS, nbits)
        first, last = np.searchsorted(positions, (start, stop))
        bits = np.zeros(stop - start, dtype=np.uint8)
        bits[positions[first:last] - start] = 1
        stream[start // 8 : bytes_for(stop)] = np.packbits(bits, bitorder="little")
    return stream


def find_bits(stream: Bytes, count: int, numel: int, tensor: str, part: str) -> Indices:
    """Positions of the 1 bits of a stream, which must be exactly `count`; none is trusted to be below `numel`.

    Their type is that of a tensor of `numel` elements, unless the stream is too long for it.
    """
    fits = numel < 2**31 and 8 * len(stream) <= 2**31  # the unary stream of a Rice code may reach beyond `numel`
    positions: Indices = np.empty(count, np.int32) if fits else np.empty(count, np.int64)
    done = 0
    for start in range(0, len(stream), _CHUNK_BITS // 8):
        bits = np.unpackbits(stream[start : start + _CHUNK_BITS // 8], bitorder="little")
        found = np.flatnonzero(bits.view(np.bool_))
        if done + len(found) > count:
            fail(tensor, f"has more than {count} ones in its {part} stream")
        positions[done : done + len(found)] = found + 8 * start
        done += len(found)
    if done != count:
        fail(tensor, f"has {done} ones in its {part} stream instead of {count}")
    return positions


def pack_values(values: npt.NDArray[np.integer], k: int) -> Bytes:
    """Values below 2^k as a stream of k bits each, the lowest bit first; 0 ≤ k ≤ 24."""
    if not k:
        return np.empty(0, dtype=np.uint8)
    count = bytes_for(len(values)) * 8
    if k <= 8:
        narrow = np.zeros(count, dtype=np.uint8)
        narrow[: len(values)] = values
        words = narrow.view("<u8")
        for fields in (1, 2, 4):
            even = _every_other(fields, k)
            odd = words >> np.uint64(fields * (8 - k)) & even << np.uint64(fields * k)
            words &= even
            words |= odd
        stream = np.ascontiguousarray(narrow.reshape(-1, 8)[:, :k])
    else:
        wide = np.zeros(count, dtype=np.uint32)
        wide[: len(values)] = values
        groups = wide.reshape(-1, 8)
        stream = np.zeros((len(groups), k), dtype=np.uint8)
        for lane, (first, shift, touched) in enumerate(_lanes(k)):
            shifted = groups[:, lane] << np.uint32(shift)
            for byte in range(touched):
                stream[:, first + byte] |= (shifted >> np.uint32(8 * byte)).astype(np.uint8)
    return stream.reshape(-1)[: bytes_for(len(values) * k)]


def unpack_values(stream: Bytes, k: int, start: int, stop: int) -> npt.NDArray[np.uint8] | npt.NDArray[np.uint32]:
    """Values `start` to `stop` of a stream of k-bit values, as bytes where they fit; `start` is a multiple of 8."""
    if not k:
        return np.zeros(stop - start, dtype=np.uint8)
    groups = bytes_for(stop - start)
    part = stream[start // 8 * k : start // 8 * k + groups * k]
    padded = np.zeros(groups * k, dtype=np.uint8)
    padded[: len(part)] = part
    blocks = padded.reshape(groups, k)
    if k <= 8:
        wide = np.zeros((groups, 8), dtype=np.uint8)
        wide[:, :k] = blocks
        words = wide.reshape(-1).view("<u8")
        for fields in (4, 2, 1):
            even = _every_other(fields, k)
            odd = (words & even << np.uint64(fields * k)) << np.uint64(fields * (8 - k))
            words &= even
            words |= odd
        return wide.reshape(-1)[: stop - start]
    values = np.empty((groups, 8), dtype=np.uint32)
    for lane, (first, shift, touched) in enumerate(_lanes(k)):
        word = blocks[:, first].astype(np.uint32)
        for byte in range(1, touched):
            word |= blocks[:, first + byte].astype(np.uint32) << np.uint32(8 * byte)
        values[:, lane] = (word >> np.uint32(shift)) & np.uint32((1 << k) - 1)
    return values.reshape(-1)[: stop - start]


@cache
def _every_other(fields: int, k: int) -> np.uint64:
    """The even ones of fields of k bits, so many of them together, which begin every so many bytes of a word."""
    return np.uint64(sum((1 << fields * k) - 1 << start for start in range(0, 64, 16 * fields)))


@cache
def _lanes(k: int) -> list[tuple[int, int, int]]:
    """Eight k-bit values fill k bytes: (first byte, shift within it, bytes touched) of each of the eight."""
    return [(lane * k // 8, lane * k % 8, bytes_for(lane * k % 8 + k)) for lane in range(8)]


def check_padding(stream: Bytes, nbits: int, tensor: str, part: str) -> None:
    """Refuse a stream whose last byte has bits set beyond `nbits`."""
    if nbits % 8 and stream[-1] >> (nbits % 8):
        fail(tensor, f"has padding bits set in its {part} stream")
