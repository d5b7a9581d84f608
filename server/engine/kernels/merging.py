"""Deltas folded into weights, in plain PyTorch: what the fast implementations must equal bit for bit, and what is used
where none of them can."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch

from server.engine.kernels.byte_lists import byte_places
from server.engine.kernels.packing import dense, places
from server.engine.kernels.types import (
    BLOCK,
    BitPlanes,
    ByteLists,
    DenseValues,
    LoadedTerm,
    Overwrites,
    PackedDelta,
    SparseRows,
    rows_and_columns,
)


def merge_tensor(out: torch.Tensor, pristine: torch.Tensor, terms: Sequence[LoadedTerm]) -> None:
    """`out ← pristine + Σ weight·delta`, summed in float32 and rounded to `out`'s dtype once (methods §2, Eq. 5).

    What overwrites alone, at weight 1, is set and not added: the fine-tune's own bits come out. Otherwise its delta is
    new − pristine in float32.

    Reference: `merge_tensor_reference`, which it equals bit for bit.
    """
    weight, delta = terms[0]
    if len(terms) == 1 and isinstance(delta, Overwrites) and weight == 1.0:
        out.copy_(pristine)
        out.view(-1).index_put_((delta.places.long(),), delta.values.to(out.dtype))
        return
    if len(terms) == 1 and isinstance(delta, SparseRows | ByteLists):
        at, values = _nonzeros(delta, weight)
        out.copy_(pristine)
        flat = out.view(-1)
        if out.dtype is torch.float32:
            flat.index_add_(0, at, values)
        else:
            flat.index_put_((at,), pristine.view(-1).index_select(0, at).float().add_(values).to(out.dtype))
        return
    if len(terms) == 1 and isinstance(delta, BitPlanes) and delta.digits == 1 and out.dtype is torch.float32:
        # Fused multiply-adds round differently, but not where one factor is 0 or ±1.
        torch.add(pristine, _levels(delta), alpha=weight * delta.scale, out=out)
        return
    total = torch.zeros(out.numel(), dtype=torch.float32, device=out.device)
    for weight, delta in terms:
        if isinstance(delta, SparseRows | ByteLists):
            total.index_add_(0, *_nonzeros(delta, weight))
        elif isinstance(delta, Overwrites):
            at = delta.places.long()
            total.index_add_(0, at, _moved(delta, pristine.view(-1).index_select(0, at)) * weight)
        elif isinstance(delta, BitPlanes):
            total.add_((_levels(delta) * (weight * delta.scale)).view(-1))
        else:
            total.add_(delta.values.view(-1) * weight)  # not alpha=weight: a fused multiply-add rounds differently
    out.copy_(total.add_(pristine.view(-1)).view_as(out))


def merge_tensor_reference(pristine: torch.Tensor, terms: Sequence[LoadedTerm]) -> torch.Tensor:
    """Plain PyTorch: densify every delta, add up in float32, round once."""
    total = torch.zeros(pristine.shape, dtype=torch.float32)
    flat = pristine.reshape(-1)
    for weight, delta in terms:
        if not isinstance(delta, Overwrites):
            total += _weighted(delta, weight)
        elif len(terms) == 1 and weight == 1.0:
            return torch.scatter(flat, 0, delta.places.long(), delta.values.to(flat.dtype)).view(pristine.shape)
        else:
            moved = torch.zeros(flat.shape)
            moved[delta.places.long()] = _moved(delta, flat[delta.places.long()])
            total += moved.view(pristine.shape) * weight
    return (pristine.float() + total).to(pristine.dtype)


def _moved(delta: Overwrites, pristine: torch.Tensor) -> torch.Tensor:
    """new − pristine at the delta's places, float32."""
    return delta.values.float() - pristine.float()


def _weighted(delta: PackedDelta, weight: float) -> torch.Tensor:
    """weight·delta, dense float32. The product of weight and scale is rounded to float32 once."""
    if isinstance(delta, DenseValues):
        return delta.values * weight
    return dense(replace(delta, scale=1.0)) * (weight * delta.scale)


@functools.cache
def _eight_levels(device: torch.device) -> torch.Tensor:
    """`[65536]` int64: the eight int8 levels of a byte of the plane of +1 and, above it, one of the plane of −1."""
    bits = ((torch.arange(1 << 16)[:, None] >> torch.arange(16)) & 1).to(torch.int8)
    return (bits[:, :8] - bits[:, 8:]).contiguous().view(torch.int64).view(-1).to(device)


def _levels(delta: BitPlanes) -> torch.Tensor:
    """The levels of a delta, int8, in its own shape: eight per look-up, several times faster than bit by bit."""
    blocks, digits, columns = delta.words.shape[:3]
    planes = delta.words.view(torch.uint8).view(blocks, digits, columns, 2, BLOCK, 4).permute(1, 3, 0, 4, 2, 5)

    def trits(digit: int) -> torch.Tensor:
        plus, minus = planes[digit].to(torch.int32)
        return _eight_levels(delta.device).index_select(0, (plus + (minus << 8)).reshape(-1)).view(torch.int8)

    total = trits(0)
    for digit in range(1, digits):
        # A level fits 8 bits, so what exceeds them on the way cancels out.
        total = total + trits(digit) * ((3**digit + 128) % 256 - 128)
    rows, size = rows_and_columns(delta.shape)
    return total.view(blocks * BLOCK, columns * BLOCK)[:rows, :size].reshape(delta.shape)


def _nonzeros(delta: SparseRows | ByteLists, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat positions, int64, and weighted values, float32, of a sparse delta's nonzeros, each once."""
    if isinstance(delta, ByteLists):
        row, column, levels = byte_places(delta, torch.arange(rows_and_columns(delta.shape)[0], device=delta.device))
        return row * delta.shape[-1] + column, levels * (weight * delta.scale)
    owner, chosen = places(delta, torch.arange(len(delta.order), device=delta.device))
    entries = delta.entries[chosen].long() & 0xFFFF
    levels = (1 - 2 * (entries & 1)).float()
    if delta.levels is not None:
        levels *= delta.levels[chosen]
    rows = delta.order.long() * delta.shape[-1]
    return rows[owner].add_(entries >> 1), levels * (weight * delta.scale)
