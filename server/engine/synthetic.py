"""Experts made up to be timed: of one form, in every matrix of a model's layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from server.engine.expert import DecodedExpert
from server.engine.kernels import Kernels, PackedDelta, pack
from server.engine.kernels.byte_lists import ABREAST, IN_BYTES
from server.engine.kernels.types import BLOCK, BitPlanes, ByteLists, DenseValues, SparseRows
from store.deltas import DenseDelta, SparseDelta

DENSITIES = {BitPlanes: 0.3, SparseRows: 0.03, ByteLists: 0.03}
"""Of forms that have one: what lies well within those that take them."""
_DRAWN = 1 << 20
"""Most elements that are drawn at random; larger matrices repeat them."""
_APART = 64 << 20
"""Bytes of deltas that lie apart, so that no cache has them still when the next step comes; further ones share the
last of their shape."""

Shape = tuple[int, int]


def forms_of(kernels: Kernels) -> tuple[type[PackedDelta], ...]:
    """What experts of such kernels may be made of."""
    lists: tuple[type[PackedDelta], ...] = (ByteLists, SparseRows) if kernels.lanes == IN_BYTES else (SparseRows,)
    return (BitPlanes, *lists, DenseValues)


def synthetic_expert(
    form: type[PackedDelta], shapes: Mapping[str, Shape], device: torch.device, kernels: Kernels
) -> DecodedExpert:
    """One whose matrices of a shape have equal deltas, of the form.

    Args:
        shapes: of all matrices, by name. Those with more columns than lists can have get none of these.
    """
    made = {shape: _delta(form, shape, device, kernels) for shape in set(shapes.values())}
    tensors: dict[str, PackedDelta] = {}
    room = _APART
    for name, shape in shapes.items():
        delta = made[shape]
        if not isinstance(delta, form):
            continue
        if room > 0 and any(delta is other for other in tensors.values()):
            delta = made[shape] = _copy(delta)
        room -= delta.nbytes
        tensors[name] = delta
    return DecodedExpert(f"synthetic {form.__name__}", tensors)


def _copy(delta: PackedDelta) -> PackedDelta:
    tensors: dict[str, Any] = {k: v.clone() for k, v in vars(delta).items() if isinstance(v, torch.Tensor)}
    return replace(delta, **tensors)


def _delta(form: type[PackedDelta], shape: Shape, device: torch.device, kernels: Kernels) -> PackedDelta:
    rng, (out, width) = np.random.default_rng(0), shape
    drawn = min(out, max(BLOCK, _DRAWN // width // BLOCK * BLOCK))
    times = -(-out // drawn)
    if form is DenseValues:
        values = rng.standard_normal((drawn, width), np.float32) * np.float32(0.01)
        return pack(DenseDelta(np.tile(values, (times, 1))[:out]), device)
    if times > 1 and out % BLOCK:
        drawn, times = out, 1  # a block of rows has zeros beyond the last one
    numel = drawn * width
    kept = np.unique(rng.integers(0, numel, math.ceil(DENSITIES[form] * numel))).astype(np.int32)
    levels = rng.choice(np.array([-1, 1], np.int8), len(kept))
    lanes = IN_BYTES if form is ByteLists else min(kernels.lanes, ABREAST)
    delta = pack(SparseDelta((drawn, width), kept, levels, 0.01), device, lanes, 0.0 if form is BitPlanes else 1.0)
    return delta if times == 1 else _repeated(delta, times, shape)


def _repeated(delta: PackedDelta, times: int, shape: Shape) -> PackedDelta:
    """Its rows, a multiple of `BLOCK`, so many times; of those as many as the shape has, a multiple too."""
    if isinstance(delta, BitPlanes):
        words = delta.words.repeat(times, 1, 1, 1, 1)[: shape[0] // BLOCK].contiguous()
        return BitPlanes(shape, delta.scale, words)
    if isinstance(delta, DenseValues):
        return delta
    (rows, _), count = delta.shape, len(delta.entries)
    turns = torch.arange(times, dtype=torch.int32, device=delta.device)[:, None]
    starts = torch.cat([(delta.starts[None, :-1] + turns * count).view(-1), delta.starts.new_tensor([times * count])])
    if isinstance(delta, ByteLists):
        starts = starts[: 2 * shape[0] // BLOCK + 1].contiguous()
        vectors = int(starts[-1])
        places = delta.places.repeat(times)[: shape[0]].contiguous()
        pieces = delta.pieces.repeat(times)[:vectors].contiguous()
        entries = delta.entries.repeat(times, 1, 1)[:vectors].contiguous()
        return ByteLists(shape, delta.scale, places, starts, pieces, entries, None)
    order = (delta.order[None] + turns * rows).view(-1)[: shape[0]]
    starts = starts[: shape[0] + 1]
    entries = delta.entries.repeat(times)[: int(starts[-1])]
    return SparseRows(
        shape, delta.scale, order.contiguous(), starts.contiguous(), entries.contiguous(), None, delta.lanes
    )
