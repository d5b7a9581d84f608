"""Merged mode: fold a mix's deltas into the weights that the model runs with.

The pristine weights are never written to. A mix is built in buffers beside them, and the model's parameters are
pointed at the buffers; going back to the base is pointing them back, which is exact by construction, costs nothing,
and works after any failure in between. Where memory allows, the buffers of several mixes are kept: what is hot is then
built once, and a switch between such mixes costs nothing either. A mix names its experts by what they contain, so what
is kept never goes stale.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import nn

from server.engine.buffers import Buffers
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
        room: how many mixes are kept at once, however many of the weights they change; at least one.
        switches: how often `current` changed.
        patches: how often a mix had to be built for that.
        seconds: time spent changing it.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], kernels: Kernels, budget_bytes: int = 0) -> None:
        """Args:
        kernels: what merges.
        budget_bytes: memory for built mixes; at least that of one which changes every weight.
        """
        self._parameters = parameters
        self._kernels = kernels
        self._pristine = {name: parameter.data for name, parameter in parameters.items()}
        whole = max(1, sum(tensor.nbytes for tensor in self._pristine.values()))
        self._buffers = Buffers(self._pristine, max(whole, budget_bytes))
        self._built: OrderedDict[Mix, dict[str, torch.Tensor]] = OrderedDict()
        """The buffers of every mix that is kept, the one used last at the end."""
        self.room = self._buffers.budget // whole
        self.current: Mix = BASE_MIX
        self.moved: frozenset[tuple[str, int]] = frozenset()
        """Names of the parameters that point at buffers now, and where these lie."""
        self.switches = self.patches = 0
        self.seconds = 0.0

    @property
    def used_bytes(self) -> int:
        """Of memory besides the pristine weights'."""
        return self._buffers.used_bytes

    @property
    def built(self) -> tuple[Mix, ...]:
        """The mixes whose weights lie ready, the one used last at the end; the base's always do."""
        return (*self._built,)

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
            self.current, self.moved = BASE_MIX, frozenset()
            if not mix.is_base:
                if mix not in self._built:
                    self._build(mix, experts)
                self._built.move_to_end(mix)
                self._point_at(self._built[mix])
                self.current = mix
                self.moved = frozenset((name, buffer.data_ptr()) for name, buffer in self._built[mix].items())
        finally:
            self.switches += 1
            self.seconds += time.perf_counter() - started

    def _build(self, mix: Mix, experts: Mapping[str, DecodedExpert]) -> None:
        changed = {name for digest, _ in mix.parts for name in experts[digest].tensors}
        names = [name for name in self._pristine if name in changed]
        while not self._buffers.make_room(names) and self._built:
            self._buffers.put_back(self._built.popitem(last=False)[1])
        buffers = self._buffers.take(names)
        try:
            for name, buffer in buffers.items():
                self._kernels.merge(buffer, self._pristine[name], terms_of(mix, name, experts))
        except BaseException:
            self._buffers.put_back(buffers)
            raise
        self._built[mix] = buffers
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
