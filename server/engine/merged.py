"""Merged mode: fold a mix's deltas into the weights that the model runs with.

The pristine weights are never written to. A mix is built in buffers beside them, and the model's parameters are
pointed at the buffers; going back to the base is pointing them back, which is exact by construction, costs nothing,
and works after any failure in between.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping

import torch
from torch import nn

from server.engine.expert import DecodedExpert
from server.engine.kernels import Kernels
from server.engine.kernels.types import LoadedTerm
from store.mix import BASE_MIX, Mix


def terms_of(mix: Mix, name: str, experts: Mapping[str, DecodedExpert]) -> list[LoadedTerm]:
    """What a mix adds to the parameter `name`, in the mix's order."""
    return [(weight, experts[d].tensors[name]) for d, weight in mix.parts if name in experts[d].tensors]


class MergedWeights:
    """Which mix the model's parameters hold, and the way from one mix to the next.

    Attributes:
        current: the mix the model runs with.
        switches: how often `current` changed.
        patches: how often a mix had to be built for that.
        seconds: time spent changing it.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        kernels: Kernels,
    ) -> None:
        """Args:
        kernels: what merges.
        """
        self._parameters = parameters
        self._kernels = kernels
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
            self._kernels.merge(buffer, pristine, terms_of(mix, name, experts))
            built[name] = buffer
        self.built, self._built = mix, built
        self.patches += 1

    def _point_at(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            self._parameters[name].data = tensor

    def fingerprint(self) -> str:
        """sha256 over the bytes of the weights that the model runs with now, in the order of their names."""
        return digest_of({name: parameter.data for name, parameter in self._parameters.items()})

    def pristine_fingerprint(self) -> str:
        """sha256 over the bytes of the pristine weights; never changes while the process lives."""
        return digest_of(self._pristine)


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over the names and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()
