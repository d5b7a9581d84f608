"""Where the nonzeros of a tensor are, as bits. NumPy only; no torch.

The layouts, of which the encoder takes the smallest, per tensor:

* `bitmap`: one bit per element.
* `rice`: the gap before each nonzero in a Rice code with parameter k (Rice 1971, as ComPEFT, arXiv 2311.13171, uses
  it for sparse task vectors).
* `rice-zeros`: the same of the zeros, for a tensor that is mostly nonzero; of one without zeros, nothing at all.
* `grouped`: groups of c elements; a bit per group that says whether it is empty, and per nonzero its place in the group
  and whether it is the group's last (SASS of AFS, arXiv 2604.28109, in streams of their own).

A textbook Rice stream is sequential: each codeword starts where the last one ended. Here its parts are kept in two
streams (quotients in unary, k-bit remainders), so that decoding is array arithmetic. Let p_i be the position of the
i-th terminator in the unary stream and R_i = r_0 + ... + r_i the running sum of the remainders; since each terminator
is preceded by one zero per unit of quotient, the quotients up to i sum to p_i − i, and

    index_i = ((p_i − i) << k) + R_i + i.

Rice with k = log2 c takes nnz (k + 1) + Σ ⌊gap / c⌋ bits, `grouped` nnz (k + 1) + n / c, and the gaps sum to less than
n: so Rice never takes more, and `encode_positions` need not try `grouped`. It is for files by others, and to compare.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from store.bits import (
    Bytes,
    Indices,
    as_indices,
    bytes_for,
    check_padding,
    fail,
    find_bits,
    pack_values,
    set_bits,
    unpack_values,
)

BITMAP = "bitmap"
RICE = "rice"
RICE_ZEROS = "rice-zeros"
GROUPED = "grouped"
MIN_K, MAX_K = 1, 24
"""k = 0 is the bitmap itself; beyond 24 (mean gap over 16 million) there is nothing left to save."""
MIN_GROUP, MAX_GROUP = 2, 256
PARAMETER: dict[str, tuple[str, int, int] | None] = {
    BITMAP: None,
    RICE: ("k", MIN_K, MAX_K),
    RICE_ZEROS: ("k", MIN_K, MAX_K),
    GROUPED: ("group", MIN_GROUP, MAX_GROUP),
}
"""Layout → the name and range of its parameter."""

_CHUNK_VALUES = 1 << 18
"""Values decoded at a time; a multiple of 8, so that every chunk of remainders starts on a byte."""


@dataclass(frozen=True)
class Layout:
    """How positions are laid out: a name, and what the decoder needs besides nnz and numel."""

    name: str
    params: dict[str, int]


def encode_positions(indices: Indices, numel: int) -> tuple[Layout, bytes]:
    """The layout that takes the fewest bytes, `bitmap` on a tie, and the bytes.

    Args:
        indices: `[nnz]` integers, strictly ascending, in [0, numel).
        numel: elements of the tensor.
    """
    nnz = len(indices)
    if not nnz:
        return Layout(BITMAP, {}), bytes(bytes_for(numel))
    if 2 * nnz <= numel:
        found = _in_rice_code(RICE, indices, numel)
    else:
        absent = np.ones(numel, dtype=np.bool_)
        absent[indices] = False
        found = _in_rice_code(RICE_ZEROS, as_indices(np.flatnonzero(absent), numel), numel)
    return found or (Layout(BITMAP, {}), set_bits(indices, numel).tobytes())


def encode_mask(is_set: npt.NDArray[np.bool_], count: int) -> tuple[Layout, bytes]:
    """`encode_positions` of the elements of a mask that are True, of which there are `count`."""
    numel = len(is_set)
    if 2 * count <= numel:
        found = _in_rice_code(RICE, as_indices(np.flatnonzero(is_set), numel), numel)
    else:
        found = _in_rice_code(RICE_ZEROS, as_indices(np.flatnonzero(~is_set), numel), numel)
    return found or (Layout(BITMAP, {}), np.packbits(is_set, bitorder="little").tobytes())


def decode_positions(layout: Layout, payload: Bytes, *, nnz: int, numel: int, tensor: str) -> Indices:
    """Recover the positions. The payload may be hostile: nothing is trusted but `numel`, and 0 ≤ nnz ≤ numel.

    Returns:
        `[nnz]` int32 (int64 from 2³¹ elements), strictly ascending, below numel.

    Raises:
        ExpertFileError: a stream has the wrong length, count, range or padding; `param` is the tensor.
    """
    rule = PARAMETER.get(layout.name)
    if layout.name not in PARAMETER or layout.params.keys() != ({rule[0]} if rule else set()):
        fail(tensor, f"has the unknown encoding {layout.name} {layout.params}; a newer Switchyard may read it")
    value = layout.params[rule[0]] if rule else 0
    if rule and not rule[1] <= value <= rule[2]:
        fail(tensor, f"has the {layout.name} parameter {rule[0]} = {value}; it must be {rule[1]} to {rule[2]}")
    if layout.name == RICE:
        return _decode_rice(payload, value, nnz, numel, tensor)
    if layout.name == GROUPED:
        return _decode_grouped(payload, value, nnz, numel, tensor)
    if layout.name == RICE_ZEROS:
        present = np.ones(numel, dtype=np.bool_)
        present[_decode_rice(payload, value, numel - nnz, numel, tensor)] = False
        return as_indices(np.flatnonzero(present), numel)
    if len(payload) != bytes_for(numel):
        fail(tensor, f"has {len(payload)} bytes of positions, its bitmap needs {bytes_for(numel)}")
    check_padding(payload, numel, tensor, "mask")
    return find_bits(payload, nnz, numel, tensor, "mask")


def _in_rice_code(name: str, indices: Indices, numel: int) -> tuple[Layout, bytes] | None:
    """At most half of so many elements; None unless that is shorter than a bitmap of all."""
    limit = bytes_for(numel)
    if not len(indices):
        return (Layout(name, {"k": MIN_K}), b"") if limit else None
    gaps = np.empty_like(indices)
    gaps[0] = indices[0]
    np.subtract(indices[1:], indices[:-1], out=gaps[1:])
    gaps[1:] -= 1
    k, unary_bits = _best_k(gaps)
    if bytes_for(unary_bits) + bytes_for(len(gaps) * k) >= limit:
        return None
    steps = gaps >> k
    steps[1:] += 1
    terminators = np.cumsum(steps, dtype=np.int64)
    remainders = pack_values(gaps & ((1 << k) - 1), k)
    return Layout(name, {"k": k}), set_bits(terminators, unary_bits).tobytes() + remainders.tobytes()


def _best_k(gaps: Indices) -> tuple[int, int]:
    """The k of least size, and the bits of its unary stream. The size is convex in k: walking downhill is exact.

    With q_k the sum of the quotients, the size is nnz (1 + k) + q_k. A larger k is shorter only if q_k > nnz, as the
    next sum is not below 0, and a smaller one only if q_k < nnz, as the one before is not below 2 q_k.
    """
    nnz = len(gaps)

    def quotients(k: int) -> int:
        return int(np.sum(gaps >> k, dtype=gaps.dtype))  # less than there are elements, so it fits

    mean = max(1.0, float(np.sum(gaps, dtype=gaps.dtype)) / nnz * np.log(2))
    k = min(max(int(np.log2(mean)), MIN_K), MAX_K)
    total = quotients(k)
    step = 1 if total > nnz else -1
    while total != nnz and MIN_K <= k + step <= MAX_K and (other := quotients(k + step)) + nnz * step < total:
        k, total = k + step, other
    return k, nnz + total


def _decode_rice(streams: Bytes, k: int, nnz: int, numel: int, tensor: str) -> Indices:
    unary_bytes = len(streams) - bytes_for(nnz * k)
    # The quotients of gaps that sum to less than numel sum to at most numel >> k.
    if not bytes_for(nnz) <= unary_bytes <= (bytes_for(nnz + (numel >> k)) if nnz else 0):
        fail(tensor, f"has {len(streams)} bytes of Rice code, which cannot hold {nnz} gaps with k = {k}")
    unary, remainders = streams[:unary_bytes], streams[unary_bytes:]
    check_padding(remainders, nnz * k, tensor, "remainders")
    indices = find_bits(unary, nnz, numel, tensor, "unary")
    if unary_bytes and not unary[-1]:
        fail(tensor, "has bytes after the last gap of its unary stream")
    # With the order and the terminator of each gap among the remainders, what is left is p_i << k.
    less = (1 << k) - 1
    total = less
    # All of these stay below 2³¹ then, whatever the streams say.
    small = numel < 2**29 and nnz << k < 2**29
    dtype: np.dtype[np.signedinteger] = np.dtype(np.int32 if small else np.int64)
    for start in range(0, nnz, _CHUNK_VALUES):
        stop = min(start + _CHUNK_VALUES, nnz)
        chunk: Indices = np.subtract(unpack_values(remainders, k, start, stop), less, dtype=dtype)
        chunk[0] += total
        np.cumsum(chunk, out=chunk)
        total = int(chunk[-1])
        chunk += indices[start:stop].astype(dtype, copy=False) << k
        if chunk[0] < 0 or chunk[-1] >= numel:
            fail(tensor, f"has an index beyond its {numel} elements")
        indices[start:stop] = chunk
    return as_indices(indices, numel)


def best_group(nnz: int, numel: int) -> int:
    """The group size with the fewest bits; a power of two wastes nothing of its place bits."""
    sizes = [1 << power for power in range(1, 9)]
    return min(sizes, key=lambda group: -(-numel // group) + nnz * (_place_bits(group) + 1))


def encode_grouped(indices: Indices, numel: int, group: int) -> tuple[Layout, bytes]:
    """Positions in groups of `group` (2 to 256) elements: group map, last flags, places."""
    groups = (indices // group).astype(np.int64)
    last = np.empty(len(indices), dtype=np.bool_)
    last[:-1], last[-1:] = groups[1:] != groups[:-1], True
    occupied = set_bits(groups[last], -(-numel // group))
    places = pack_values(indices - groups * group, _place_bits(group))
    flags = np.packbits(last, bitorder="little")
    return Layout(GROUPED, {"group": group}), occupied.tobytes() + flags.tobytes() + places.tobytes()


def _decode_grouped(payload: Bytes, group: int, nnz: int, numel: int, tensor: str) -> Indices:
    groups, bits = -(-numel // group), _place_bits(group)
    lengths = bytes_for(groups), bytes_for(nnz), bytes_for(nnz * bits)
    if len(payload) != sum(lengths):
        fail(tensor, f"has {len(payload)} bytes of positions, its groups of {group} need {sum(lengths)}")
    occupied, flags, places = np.split(payload, np.cumsum(lengths)[:-1])
    check_padding(occupied, groups, tensor, "groups")
    check_padding(flags, nnz, tensor, "last")
    check_padding(places, nnz * bits, tensor, "places")
    last = np.unpackbits(flags, count=nnz, bitorder="little").view(np.bool_)
    if nnz and not last[-1]:
        fail(tensor, "has a group without a last element")
    found = find_bits(occupied, int(np.count_nonzero(last)), groups, tensor, "groups").astype(np.int64)
    within: npt.NDArray[np.int64] = np.cumsum(last) - last
    place = unpack_values(places, bits, 0, nnz)
    indices = found[within] * group + place if nnz else np.empty(0, dtype=np.int64)
    if nnz and (int(place.max()) >= group or indices[-1] >= numel or not bool((indices[1:] > indices[:-1]).all())):
        fail(tensor, f"has indices that do not ascend below its {numel} elements")
    return as_indices(indices, numel)


def _place_bits(group: int) -> int:
    return (group - 1).bit_length()
