"""Merged mode: fold a mix's deltas into the weights that the model runs with.

The pristine weights are never written to. A mix is built in buffers beside them, and the model's parameters are
pointed at the buffers; going back to the base is pointing them back, which is exact by construction, costs nothing,
and works after any failure in between.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from server.engine.expert import DecodedExpert
from server.engine.kernels import LoadedDelta, PackedDelta, dense
from server.engine.kernels.types import BLOCK, BitPlanes, DenseValues, Overwrites, SparseRows, rows_and_columns
from store.mix import BASE_MIX, Mix

Term = tuple[float, LoadedDelta]
"""A weight of the mix and the delta it is for."""


def terms_of(mix: Mix, name: str, experts: Mapping[str, DecodedExpert]) -> list[Term]:
    """What a mix adds to the parameter `name`, in the mix's order."""
    return [(weight, experts[d].tensors[name]) for d, weight in mix.parts if name in experts[d].tensors]


def merge_tensor(out: torch.Tensor, pristine: torch.Tensor, terms: Sequence[Term]) -> None:
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
    if len(terms) == 1 and isinstance(delta, SparseRows):
        places, values = _nonzeros(delta, weight)
        out.copy_(pristine)
        flat = out.view(-1)
        if out.dtype is torch.float32:
            flat.index_add_(0, places, values)
        else:
            flat.index_put_((places,), pristine.view(-1).index_select(0, places).float().add_(values).to(out.dtype))
        return
    if len(terms) == 1 and isinstance(delta, BitPlanes) and delta.digits == 1 and out.dtype is torch.float32:
        # Fused multiply-adds round differently, but not where one factor is 0 or ±1.
        torch.add(pristine, _levels(delta), alpha=weight * delta.scale, out=out)
        return
    total = torch.zeros(out.numel(), dtype=torch.float32, device=out.device)
    for weight, delta in terms:
        if isinstance(delta, SparseRows):
            total.index_add_(0, *_nonzeros(delta, weight))
        elif isinstance(delta, Overwrites):
            places = delta.places.long()
            total.index_add_(0, places, _moved(delta, pristine.view(-1).index_select(0, places)) * weight)
        elif isinstance(delta, BitPlanes):
            total.add_((_levels(delta) * (weight * delta.scale)).view(-1))
        else:
            total.add_(delta.values.view(-1) * weight)  # not alpha=weight: a fused multiply-add rounds differently
    out.copy_(total.add_(pristine.view(-1)).view_as(out))


def merge_tensor_reference(pristine: torch.Tensor, terms: Sequence[Term]) -> torch.Tensor:
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


def _nonzeros(delta: SparseRows, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat positions, int64, and weighted values, float32, of a sparse delta's nonzeros, each once."""
    counts = (delta.starts[1:] - delta.starts[:-1]).long()
    entries = delta.entries.long() & 0xFFFF
    places = torch.repeat_interleave(delta.order.long() * delta.shape[-1], counts).add_(entries >> 1)
    levels = (1 - 2 * (entries & 1)).float()
    if delta.levels is not None:
        levels *= delta.levels
    return places, levels * (weight * delta.scale)


class MergedWeights:
    """Which mix the model's parameters hold, and the way from one mix to the next.

    Attributes:
        current: the mix the model runs with.
        switches: how often `current` changed.
        patches: how often a mix had to be built for that.
        seconds: time spent changing it.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], fixed: Mapping[str, torch.Tensor] | None = None) -> None:
        """Args:
        fixed: what else the model computes with, and no mix changes: buffers, quantised weights.
        """
        self._parameters = parameters
        self._fixed = dict(fixed or {})
        self._pristine = {name: parameter.data for name, parameter in parameters.items()}
        self._buffers: dict[str, torch.Tensor] = {}
        self._built: dict[str, torch.Tensor] = {}
        """The buffers that make up `built`."""
        self.built: Mix = BASE_MIX
        """The mix that lies in the buffers, whether the model runs with it or not; the base's needs none."""
        self.current: Mix = BASE_MIX
        self.switches = self.patches = 0
        self.seconds = 0.0

    @torch.inference_mode()
    def apply(self, mix: Mix, experts: Mapping[str, DecodedExpert]) -> None:
        """Make the model run with `mix`; a no-op if it does already.

        If anything fails, the model is back on the base and the exception passes on.

        Args:
            mix: what to run.
            experts: at least every expert of `mix`, by digest.
        """
        if mix == self.current:
            return
        started = time.perf_counter()
        try:
            self._point_at(self._pristine)
            self.current = BASE_MIX
            if not mix.is_base:
                if mix != self.built:
                    self._build(mix, experts)
                self._point_at(self._built)
                self.current = mix
        finally:
            self.switches += 1
            self.seconds += time.perf_counter() - started

    def _build(self, mix: Mix, experts: Mapping[str, DecodedExpert]) -> None:
        self.built, self._built = BASE_MIX, {}
        built = {}
        for name in dict.fromkeys(name for digest, _ in mix.parts for name in experts[digest].tensors):
            pristine = self._pristine[name]
            buffer = self._buffers.setdefault(name, torch.empty_like(pristine))
            merge_tensor(buffer, pristine, terms_of(mix, name, experts))
            built[name] = buffer
        self.built, self._built = mix, built
        self.patches += 1

    def _point_at(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            self._parameters[name].data = tensor

    def fingerprint(self) -> str:
        """sha256 over the bytes of the weights that the model runs with now, in the order of their names."""
        return _digest({name: parameter.data for name, parameter in self._parameters.items()} | self._fixed)

    def pristine_fingerprint(self) -> str:
        """sha256 over the bytes of the pristine weights; never changes while the process lives."""
        return _digest(self._pristine | self._fixed)


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()
