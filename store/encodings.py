"""Bit layouts of a sparse tensor: where its nonzeros are, then their values. NumPy only; no torch.

Positions are laid out as `store.positions` says. Values follow in one of three ways: signs (one bit each, for a tensor
of ±1), levels (small integers, entropy-coded) or steps (16-bit integers, in two bytes). docs/expert-file.md is the
specification.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from store.bits import Bytes, Indices, as_indices, bytes_for, check_padding, fail
from store.positions import (
    BITMAP,
    GROUPED,
    MAX_K,
    MIN_K,
    RICE,
    RICE_ZEROS,
    Layout,
    best_group,
    decode_positions,
    encode_grouped,
    encode_positions,
)
from store.symbols import decode_symbols, encode_symbols
from store.tensor_file import MAX_NUMEL

__all__ = [
    "BITMAP", "GROUPED", "MAX_K", "MAX_LEVEL", "MIN_K", "RICE", "RICE_ZEROS", "Encoded", "Indices", "Levels", "Steps",
    "as_indices", "best_group", "decode", "decode_levels", "decode_steps", "encode_in_groups", "encode_levels",
    "encode_smallest", "encode_steps",
]  # fmt: skip

MAX_LEVEL = 127
Levels = npt.NDArray[np.int8]
Steps = npt.NDArray[np.int16]


@dataclass(frozen=True)
class Encoded:
    """A sparse tensor's positions and values as bytes.

    Attributes:
        name: the layout of the positions.
        params: what the decoder needs besides nnz and numel: the layout's parameter, the largest level, and how many
            bytes the streams of values take where the length is not known without.
        payload: the streams, one after the other.
    """

    name: str
    params: dict[str, int]
    payload: bytes


def encode_smallest(indices: Indices, levels: Levels, numel: int) -> Encoded:
    """Encode the nonzeros of a ternary tensor in the layout that takes the fewest bytes (`bitmap` on a tie).

    Args:
        indices: `[nnz]` integers, strictly ascending, in [0, numel).
        levels: `[nnz]` int8, each +1 or −1.
        numel: elements of the tensor.

    Raises:
        ValueError: the arguments break these rules.
    """
    _check_positions(indices, len(levels), numel)
    layout, positions = encode_positions(indices, numel)
    return Encoded(layout.name, layout.params, positions + _encode_signs(levels))


def encode_in_groups(indices: Indices, levels: Levels, numel: int, group: int) -> Encoded:
    """`encode_smallest` in the layout `grouped` with groups of 2 to 256 elements, whatever its size."""
    _check_positions(indices, len(levels), numel)
    layout, positions = encode_grouped(indices, numel, group)
    return Encoded(layout.name, layout.params, positions + _encode_signs(levels))


def decode(encoded: Encoded, *, nnz: int, numel: int, tensor: str) -> tuple[Indices, Levels]:
    """Recover exactly what `encode_smallest` encoded. The payload may be hostile: nothing is trusted but `numel`.

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
    indices, signs = _positions(encoded, bytes_for(nnz), nnz, numel, tensor)
    check_padding(signs, nnz, tensor, "signs")
    levels = np.unpackbits(signs, count=nnz, bitorder="little").view(np.int8)
    levels <<= 1
    levels -= 1
    return indices, levels


def encode_levels(indices: Indices, levels: Levels, numel: int) -> Encoded:
    """Encode a tensor of small integers: positions, then one symbol per nonzero, 2 (|level| − 1) + (level < 0).

    Args:
        indices, numel: as for `encode_smallest`.
        levels: `[nnz]` int8, none of them 0 or −128.

    Raises:
        ValueError: the arguments break these rules.
    """
    _check_positions(indices, len(levels), numel)
    magnitudes = np.abs(levels).view(np.uint8)  # of −128 it is 128
    if len(levels) and not (magnitudes.min() >= 1 and magnitudes.max() <= MAX_LEVEL):
        raise ValueError(f"levels must be whole numbers of 1 to {MAX_LEVEL}, with a sign")
    layout, positions = encode_positions(indices, numel)
    values = encode_symbols((magnitudes - np.uint8(1) << np.uint8(1)) + (levels < 0))
    return Encoded(
        layout.name, {**layout.params, "top": int(magnitudes.max(initial=1)), "values": len(values)}, positions + values
    )


def decode_levels(encoded: Encoded, *, nnz: int, numel: int, tensor: str) -> tuple[Indices, Levels]:
    """Recover what `encode_levels` encoded; arguments, checks and errors as `decode`."""
    layout, (top, length) = _without(encoded, ("top", "values"))
    indices, values = _positions(layout, length, nnz, numel, tensor)
    symbols = decode_symbols(values, nnz, tensor)
    highest = int(symbols.max(initial=0) >> 1) + 1
    if highest != top or highest > MAX_LEVEL:
        fail(tensor, f"has levels up to {highest} instead of {top}")
    signs = (symbols & np.uint8(1)).view(np.int8)
    levels = (symbols >> np.uint8(1)).view(np.int8)
    levels += np.int8(1)
    levels ^= -signs  # of a negative one, one more than what it shall be
    levels += signs
    return indices, levels


def encode_steps(indices: Indices, steps: Steps, numel: int) -> Encoded:
    """Encode a tensor of 16-bit integers: positions, then the high and the low bytes of the folded steps less one.

    A step s is folded to 2 s or −2 s − 1, so that small ones of either sign have a high byte of zero.

    Args:
        indices, numel: as for `encode_smallest`.
        steps: `[nnz]` int16, none of them 0.

    Raises:
        ValueError: the arguments break these rules.
    """
    _check_positions(indices, len(steps), numel)
    if not bool(np.all(steps != 0)):
        raise ValueError("steps must not be 0")
    folded = ((steps << 1) ^ (steps >> 15)).view(np.uint16) - np.uint16(1)
    layout, positions = encode_positions(indices, numel)
    high = encode_symbols((folded >> 8).astype(np.uint8))
    low = encode_symbols((folded & 0xFF).astype(np.uint8))
    params = {**layout.params, "high": len(high), "low": len(low)}
    return Encoded(layout.name, params, positions + high + low)


def decode_steps(encoded: Encoded, *, nnz: int, numel: int, tensor: str) -> tuple[Indices, Steps]:
    """Recover what `encode_steps` encoded; arguments, checks and errors as `decode`."""
    layout, (high, low) = _without(encoded, ("high", "low"))
    indices, values = _positions(layout, high + low, nnz, numel, tensor)
    upper, lower = (decode_symbols(part, nnz, tensor).astype(np.uint16) for part in (values[:high], values[high:]))
    folded = (upper << np.uint16(8)) + lower
    if nnz and folded.max() == 0xFFFF:
        fail(tensor, "has a step of 0")
    folded += np.uint16(1)
    steps: Steps = (folded >> np.uint16(1)).view(np.int16) ^ -(folded & np.uint16(1)).view(np.int16)
    return indices, steps


def _check_positions(indices: Indices, values: int, numel: int) -> None:
    nnz = len(indices)
    if values != nnz or not 0 <= numel <= MAX_NUMEL:
        raise ValueError("indices and values differ in length, or numel is out of range")
    if nnz and (indices[0] < 0 or indices[-1] >= numel or not bool(np.all(indices[1:] > indices[:-1]))):
        raise ValueError("indices must be strictly ascending and below numel")


def _encode_signs(levels: Levels) -> bytes:
    if not bool(np.all(np.abs(levels) == 1)):
        raise ValueError("levels must be +1 or -1")
    return np.packbits(levels > 0, bitorder="little").tobytes()


def _positions(encoded: Encoded, values: int, nnz: int, numel: int, tensor: str) -> tuple[Indices, Bytes]:
    """The positions, and the last `values` bytes of the payload, which are not theirs."""
    if not 0 <= nnz <= numel <= MAX_NUMEL:
        fail(tensor, f"claims {nnz} nonzeros among {numel} elements")
    payload = np.frombuffer(encoded.payload, dtype=np.uint8)
    place = len(payload) - values
    if place < 0 or values < 0:
        fail(tensor, f"has {len(payload)} payload bytes, which cannot hold its values")
    layout = Layout(encoded.name, encoded.params)
    return decode_positions(layout, payload[:place], nnz=nnz, numel=numel, tensor=tensor), payload[place:]


def _without(encoded: Encoded, names: tuple[str, ...]) -> tuple[Encoded, list[int]]:
    """The parameters that are the layout's own, and the lengths; one that is missing is one that no payload has."""
    own = {name: value for name, value in encoded.params.items() if name not in names}
    return Encoded(encoded.name, own, encoded.payload), [encoded.params.get(name, MAX_NUMEL) for name in names]
