"""Merged mode: fold a mix's deltas into the weights that the model runs with.

The pristine weights are never written to. A mix is built in buffers beside them, and the model's parameters are
pointed at the buffers; going back to the base is pointing them back, which is exact by construction, costs nothing,
and works after any failure in between.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from store.deltas import Delta, SparseDelta
from store.mix import BASE_MIX, Mix


@dataclass(frozen=True)
class SparseWeights:
    """A `SparseDelta` on the device: `indices` `[nnz]` int32 or int64, `levels` `[nnz]` int8."""

    indices: torch.Tensor
    levels: torch.Tensor
    scale: float

    @property
    def nbytes(self) -> int:
        return self.indices.nbytes + self.levels.nbytes

    def values(self, weight: float) -> torch.Tensor:
        """`[nnz]` float32: weight × scale × level. The product of the two scalars is rounded to float32 once."""
        return self.levels.float() * torch.tensor(weight * self.scale, dtype=torch.float32)


ExpertTensor = SparseWeights | torch.Tensor
"""One tensor of a decoded expert: sparse, or dense float32 in the parameter's shape."""


@dataclass(frozen=True)
class DecodedExpert:
    """All deltas of one expert on the device, ready to be merged."""

    digest: str
    tensors: Mapping[str, ExpertTensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def to_device(delta: Delta, device: torch.device) -> ExpertTensor:
    """Move a decoded delta from NumPy to the device."""
    if isinstance(delta, SparseDelta):
        indices, levels = torch.from_numpy(delta.indices), torch.from_numpy(delta.levels)
        return SparseWeights(indices.to(device), levels.to(device), delta.scale)
    return torch.from_numpy(delta.values).to(device)


def merge_tensor(out: torch.Tensor, pristine: torch.Tensor, terms: Sequence[tuple[float, ExpertTensor]]) -> None:
    """`out ← pristine + Σ weight·delta`, summed in float32 and rounded to `out`'s dtype once (methods §2, Eq. 5).

    Reference: `merge_tensor_reference`, which it equals bit for bit.
    """
    weight, delta = terms[0]
    flat = out.view(-1)
    if len(terms) == 1 and isinstance(delta, SparseWeights):
        out.copy_(pristine)
        if out.dtype is torch.float32:
            flat.index_add_(0, delta.indices, delta.values(weight))
        else:
            here = pristine.view(-1).index_select(0, delta.indices).float().add_(delta.values(weight))
            flat.index_put_((delta.indices.long(),), here.to(out.dtype))
        return
    total = torch.zeros(out.numel(), dtype=torch.float32, device=out.device)
    for weight, delta in terms:
        if isinstance(delta, SparseWeights):
            total.index_add_(0, delta.indices, delta.values(weight))
        else:
            total.add_(delta.view(-1) * weight)  # not alpha=weight: a fused multiply-add rounds differently
    out.copy_(total.add_(pristine.view(-1)).view_as(out))


def merge_tensor_reference(pristine: torch.Tensor, terms: Sequence[tuple[float, ExpertTensor]]) -> torch.Tensor:
    """Plain PyTorch: densify every delta, add up in float32, round once."""
    total = torch.zeros(pristine.shape, dtype=torch.float32)
    for weight, delta in terms:
        if isinstance(delta, SparseWeights):
            dense = torch.zeros(pristine.numel())
            dense[delta.indices.long()] = delta.values(weight)
            total += dense.view(pristine.shape)
        else:
            total += weight * delta
    return (pristine.float() + total).to(pristine.dtype)


class MergedWeights:
    """Which mix the model's parameters hold, and the way from one mix to the next.

    Attributes:
        current: the mix the model runs with.
        switches: how often `current` changed.
        seconds: time spent changing it.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self._pristine = {name: parameter.data for name, parameter in parameters.items()}
        self._buffers: dict[str, torch.Tensor] = {}
        self.current: Mix = BASE_MIX
        self.switches = 0
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
        self._restore()
        try:
            for name, terms in _terms_by_tensor(mix, experts):
                pristine = self._pristine[name]
                buffer = self._buffers.setdefault(name, torch.empty_like(pristine))
                merge_tensor(buffer, pristine, terms)
                self._parameters[name].data = buffer
            self.current = mix
        except BaseException:
            self._restore()
            raise
        finally:
            self.switches += 1
            self.seconds += time.perf_counter() - started

    def _restore(self) -> None:
        for name in self._buffers:
            self._parameters[name].data = self._pristine[name]
        self.current = BASE_MIX

    def fingerprint(self) -> str:
        """sha256 over the bytes of the weights that the model runs with now, in the order of their names."""
        return _digest({name: parameter.data for name, parameter in self._parameters.items()})

    def pristine_fingerprint(self) -> str:
        """sha256 over the bytes of the pristine weights; never changes while the process lives."""
        return _digest(self._pristine)


def _terms_by_tensor(
    mix: Mix, experts: Mapping[str, DecodedExpert]
) -> Iterator[tuple[str, list[tuple[float, ExpertTensor]]]]:
    names = dict.fromkeys(name for digest, _ in mix.parts for name in experts[digest].tensors)
    for name in names:
        yield (
            name,
            [
                (weight, experts[digest].tensors[name])
                for digest, weight in mix.parts
                if name in experts[digest].tensors
            ],
        )


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()
