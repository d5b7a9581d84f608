"""Bit layouts of a ternary sparse tensor: where its nonzeros are, and their signs. NumPy only; no torch.

Two layouts, of which the encoder takes the smaller, per tensor:

* `bitmap`: one bit per element (1 = nonzero), then one sign bit per nonzero: n (1 + d) bits.
* `rice`: the gap before each nonzero in a Rice code with parameter k (Rice 1971, as ComPEFT, arXiv 2311.13171, uses
  it for sparse task vectors), then the signs. On random positions within 3 % of the entropy bound n (H(d) + d) up to
  d = 0.38, where the bitmap takes over.

A textbook Rice stream is sequential: each codeword starts where the last one ended. Here its three parts are kept in
three streams (quotients in unary, k-bit remainders, signs), so that decoding is array arithmetic. Let p_i be the
position of the i-th terminator in the unary stream and R_i = r_0 + ... + r_i the running sum of the remainders; since
each terminator is preceded by one zero per unit of quotient, the quotients up to i sum to p_i − i, and

    index_i = ((p_i − i) << k) + R_i + i.

Every stream is little-endian in bits (bit j of a stream is bit j mod 8 of byte j div 8), starts on a byte and is
padded with zero bits. docs/expert-file.md is the specification.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from store.errors import ExpertFileError
from store.tensor_file import MAX_NUMEL

BITMAP = "bitmap"
RICE = "rice"
MIN_K, MAX_K = 1, 24
"""k = 0 is the bitmap itself; beyond 24 (mean gap over 16 million) there is nothing left to save."""

Bytes = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int32] | npt.NDArray[np.int64]
Levels = npt.NDArray[np.int8]

_CHUNK_BITS = 1 << 21
"""Bits expanded to bytes at a time: bounds the memory above the result to a few MB, and stays in cache."""
_CHUNK_VALUES = 1 << 18
"""Values decoded at a time; a multiple of 8, so that every chunk of remainders starts on a byte."""


@dataclass(frozen=True)
class Encoded:
    """A ternary tensor's positions and signs as bytes.

    Attributes:
        name: `BITMAP` or `RICE`.
        params: what the decoder needs besides nnz and numel: `{"k": ...}` for `RICE`, else empty.
        payload: the streams, one after the other.
    """

    name: str
    params: dict[str, int]
    payload: bytes


def as_indices(positions: npt.NDArray[np.int64], numel: int) -> Indices:
    """Flat positions in the type of a tensor of `numel` elements: int32 below 2³¹ of them, which halves the memory."""
    return positions.astype(np.int32) if numel < 2**31 else positions


def encode_smallest(indices: Indices, levels: Levels, numel: int) -> Encoded:
    """Encode the nonzeros of a tensor in the layout that takes the fewest bytes (`bitmap` on a tie).

    Args:
        indices: `[nnz]` integers, strictly ascending, in [0, numel).
        levels: `[nnz]` int8, each +1 or −1.
        numel: elements of the tensor.

    Raises:
        ValueError: the arguments break these rules.
    """
    nnz = len(indices)
    if len(levels) != nnz or not 0 <= numel <= MAX_NUMEL:
        raise ValueError("indices and levels differ in length, or numel is out of range")
    if nnz and (indices[0] < 0 or indices[-1] >= numel or not bool(np.all(indices[1:] > indices[:-1]))):
        raise ValueError("indices must be strictly ascending and below numel")
    if not bool(np.all(np.abs(levels) == 1)):
        raise ValueError("levels must be +1 or -1")
    signs = np.packbits(levels > 0, bitorder="little")
    if nnz:
        gaps = np.diff(indices, prepend=np.asarray([-1], dtype=indices.dtype)) - 1
        k, unary_bits = _best_k(gaps)
        if _bytes(unary_bits) + _bytes(nnz * k) < _bytes(numel):
            terminators = np.cumsum(gaps >> k, dtype=np.int64) + np.arange(nnz)
            unary = _set_bits(terminators, unary_bits)
            remainders = _pack_remainders(gaps & ((1 << k) - 1), k)
            return Encoded(RICE, {"k": k}, unary.tobytes() + remainders.tobytes() + signs.tobytes())
    return Encoded(BITMAP, {}, _set_bits(indices, numel).tobytes() + signs.tobytes())


def decode(encoded: Encoded, *, nnz: int, numel: int, tensor: str) -> tuple[Indices, Levels]:
    """Recover exactly what was encoded. The payload may be hostile: nothing is trusted but `numel`.

    Args:
        encoded: name, parameters and payload as read from a file.
        nnz: number of nonzeros the file claims; checked against numel before anything is allocated.
        numel: elements of the tensor, from the base's own shape.
        tensor: its name, for messages.

    Returns:
        indices `[nnz]` (int32, or int64 from 2³¹ elements), strictly ascending, and levels `[nnz]` int8 of ±1.

    Raises:
        ExpertFileError: any stream has the wrong length, count, range or padding; `param` is the tensor.
    """
    if not 0 <= nnz <= numel <= MAX_NUMEL:
        _fail(tensor, f"claims {nnz} nonzeros among {numel} elements")
    payload = np.frombuffer(encoded.payload, dtype=np.uint8)
    sign_bytes = _bytes(nnz)
    if encoded.name == BITMAP and not encoded.params:
        if len(payload) != _bytes(numel) + sign_bytes:
            _fail(tensor, f"has {len(payload)} payload bytes, its bitmap needs {_bytes(numel) + sign_bytes}")
        indices = _decode_bitmap(payload[: _bytes(numel)], nnz, numel, tensor)
    elif encoded.name == RICE and encoded.params.keys() == {"k"}:
        indices = _decode_rice(payload[: max(0, len(payload) - sign_bytes)], encoded.params["k"], nnz, numel, tensor)
    else:
        _fail(tensor, f"has the unknown encoding {encoded.name} {encoded.params}; a newer Switchyard may read it")
    signs = payload[len(payload) - sign_bytes :]
    _check_padding(signs, nnz, tensor, "signs")
    levels = np.unpackbits(signs, count=nnz, bitorder="little").view(np.int8)
    levels <<= 1
    levels -= 1
    return indices, levels


def _decode_bitmap(plane: Bytes, nnz: int, numel: int, tensor: str) -> Indices:
    _check_padding(plane, numel, tensor, "mask")
    return _find_bits(plane, nnz, numel, tensor, "mask")


def _decode_rice(streams: Bytes, k: int, nnz: int, numel: int, tensor: str) -> Indices:
    if not MIN_K <= k <= MAX_K:
        _fail(tensor, f"has the Rice parameter k = {k}; it must lie between {MIN_K} and {MAX_K}")
    unary_bytes = len(streams) - _bytes(nnz * k)
    # The quotients of gaps that sum to less than numel sum to at most numel >> k.
    if not _bytes(nnz) <= unary_bytes <= _bytes(nnz + (numel >> k)):
        _fail(tensor, f"has {len(streams)} bytes of Rice code, which cannot hold {nnz} gaps with k = {k}")
    unary, remainders = streams[:unary_bytes], streams[unary_bytes:]
    _check_padding(remainders, nnz * k, tensor, "remainders")
    indices = _find_bits(unary, nnz, numel, tensor, "unary")
    if unary_bytes and not unary[-1]:
        _fail(tensor, "has bytes after the last gap of its unary stream")
    total = 0
    for start in range(0, nnz, _CHUNK_VALUES):
        stop = min(start + _CHUNK_VALUES, nnz)
        order = np.arange(start, stop)
        sums = total + np.cumsum(_unpack_remainders(remainders, k, start, stop), dtype=np.int64)
        total = int(sums[-1])
        chunk = ((indices[start:stop] - order) << k) + sums + order
        if chunk[-1] >= numel:
            _fail(tensor, f"has an index beyond its {numel} elements")
        indices[start:stop] = chunk
    return indices


def _best_k(gaps: Indices) -> tuple[int, int]:
    """The k of least size, and the bits of its unary stream. The size is convex in k: walking downhill is exact."""
    nnz = len(gaps)

    def unary_bits(k: int) -> int:
        return nnz + int(np.sum(gaps >> k, dtype=np.int64))

    mean = max(1.0, float(np.mean(gaps, dtype=np.float64)) * np.log(2))
    k = min(max(int(np.log2(mean)), MIN_K), MAX_K)
    bits = unary_bits(k)
    for step in (1, -1):
        while MIN_K <= k + step <= MAX_K and (other := unary_bits(k + step)) + nnz * step < bits:
            k, bits = k + step, other
    return k, bits


def _bytes(bits: int) -> int:
    return (bits + 7) // 8


def _set_bits(positions: Indices, nbits: int) -> Bytes:
    """A stream of `nbits` bits that is 1 at the ascending `positions`."""
    stream = np.zeros(_bytes(nbits), dtype=np.uint8)
    for start in range(0, nbits, _CHUNK_BITS):
        stop = min(start + _CHUNK_BITS, nbits)
        first, last = np.searchsorted(positions, (start, stop))
        bits = np.zeros(stop - start, dtype=np.uint8)
        bits[positions[first:last] - start] = 1
        stream[start // 8 : _bytes(stop)] = np.packbits(bits, bitorder="little")
    return stream


def _find_bits(stream: Bytes, nnz: int, numel: int, tensor: str, part: str) -> Indices:
    """Positions of the 1 bits of a stream, which must be exactly `nnz`; none is trusted to be below numel."""
    positions: Indices = np.empty(nnz, np.int32) if numel < 2**31 else np.empty(nnz, np.int64)
    done = 0
    for start in range(0, len(stream), _CHUNK_BITS // 8):
        bits = np.unpackbits(stream[start : start + _CHUNK_BITS // 8], bitorder="little")
        found = np.flatnonzero(bits.view(np.bool_))
        if done + len(found) > nnz:
            _fail(tensor, f"has more than {nnz} ones in its {part} stream")
        positions[done : done + len(found)] = found + 8 * start
        done += len(found)
    if done != nnz:
        _fail(tensor, f"has {done} ones in its {part} stream instead of {nnz}")
    return positions


def _lanes(k: int) -> list[tuple[int, int, int]]:
    """Eight k-bit values fill k bytes: (first byte, shift within it, bytes touched) of each of the eight."""
    return [(lane * k // 8, lane * k % 8, _bytes(lane * k % 8 + k)) for lane in range(8)]


def _pack_remainders(values: Indices, k: int) -> Bytes:
    padded = np.zeros(_bytes(len(values)) * 8, dtype=np.uint32)
    padded[: len(values)] = values
    groups = padded.reshape(-1, 8)
    stream = np.zeros((len(groups), k), dtype=np.uint8)
    for lane, (first, shift, touched) in enumerate(_lanes(k)):
        shifted = groups[:, lane] << np.uint32(shift)
        for byte in range(touched):
            stream[:, first + byte] |= (shifted >> np.uint32(8 * byte)).astype(np.uint8)
    return stream.reshape(-1)[: _bytes(len(values) * k)]


def _unpack_remainders(stream: Bytes, k: int, start: int, stop: int) -> npt.NDArray[np.uint32]:
    """Values `start` to `stop` of a stream of k-bit values; `start` is a multiple of 8."""
    groups = _bytes(stop - start)
    part = stream[start // 8 * k : start // 8 * k + groups * k]
    padded = np.zeros(groups * k, dtype=np.uint8)
    padded[: len(part)] = part
    blocks = padded.reshape(groups, k)
    values = np.empty((groups, 8), dtype=np.uint32)
    for lane, (first, shift, touched) in enumerate(_lanes(k)):
        word = blocks[:, first].astype(np.uint32)
        for byte in range(1, touched):
            word |= blocks[:, first + byte].astype(np.uint32) << np.uint32(8 * byte)
        values[:, lane] = (word >> np.uint32(shift)) & np.uint32((1 << k) - 1)
    return values.reshape(-1)[: stop - start]


def _check_padding(stream: Bytes, nbits: int, tensor: str, part: str) -> None:
    if nbits % 8 and stream[-1] >> (nbits % 8):
        _fail(tensor, f"has padding bits set in its {part} stream")


def _fail(tensor: str, fault: str) -> NoReturn:
    raise ExpertFileError(f"tensor {tensor} {fault}; the file is damaged: create it or upload it again", param=tensor)
