"""Norms and biases of the mixes of a step: of every mix all of them side by side, so that one copy brings them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from server.engine.expert import DecodedExpert
from server.engine.forwards import Vectors
from server.engine.kernels import Kernels
from server.engine.layout import Span
from server.engine.merged import terms_of
from server.engine.sites import Kind, Site
from store.mix import Mix

_MIXES = 64
"""Mixes whose vectors are kept, least recently used first out: vectors are small."""
_ALIGNMENT = 256
"""Bytes that every vector begins at a multiple of."""

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class _Place:
    """Where a vector lies among a mix's.

    Attributes:
        name: the parameter's.
        shift: whether it is what the parameter is moved by, not what it becomes.
    """

    name: str
    shift: bool
    start: int
    stop: int
    dtype: torch.dtype

    def within(self, packed: torch.Tensor) -> torch.Tensor:
        """`[..., bytes]` uint8 → the vectors, `[..., size]`."""
        return packed[..., self.start : self.stop].view(self.dtype)


class PackedVectors:
    """The vectors of mixes at all sites, each mix's in one piece: of a norm its own, of a linear layer what its bias is
    moved by, for the module adds the pristine one by itself."""

    def __init__(self, sites: Items[Site], parameters: Mapping[str, nn.Parameter], kernels: Kernels) -> None:
        """Args:
        parameters: checkpoint name → parameter, which hold the pristine values whenever a method is called.
        """
        self._sites = sites
        self._parameters = parameters
        self._kernels = kernels
        self._places: list[dict[str, _Place]] = []
        """Of every site, by attribute."""
        start = 0
        for site in sites:
            own: dict[str, _Place] = {}
            for attribute, name in site.names.items() if site.kind is not Kind.EMBEDDING else ():
                parameter = parameters[name]
                if parameter.ndim == 1:
                    stop = start + parameter.nbytes
                    own[attribute] = _Place(name, site.kind is Kind.LINEAR, start, stop, parameter.dtype)
                    start = -(-stop // _ALIGNMENT) * _ALIGNMENT
            self._places.append(own)
        self.nbytes = start
        self._pristine: torch.Tensor | None = None
        self._mixes: OrderedDict[Mix, torch.Tensor] = OrderedDict()
        self._moved: WeakKeyDictionary[DecodedExpert, Flags] = WeakKeyDictionary()

    @property
    def device(self) -> torch.device:
        return next(iter(self._parameters.values())).device

    def moved(self, expert: DecodedExpert) -> Flags:
        """`[sites]`: whether the expert moves vectors there."""
        known = self._moved.get(expert)
        if known is None:
            known = np.array([any(p.name in expert.tensors for p in own.values()) for own in self._places], np.bool_)
            self._moved[expert] = known
        return known

    @torch.inference_mode()
    def of(self, mix: Mix, experts: Mapping[str, DecodedExpert]) -> torch.Tensor:
        """A mix's vectors: `[nbytes]` uint8, not to be written to.

        Args:
            experts: at least every expert of the mix, by digest.
        """
        if self._pristine is None:
            self._pristine = self._as_loaded()
        if not any(self.moved(experts[digest]).any() for digest, _ in mix.parts):
            return self._pristine
        known = self._mixes.get(mix)
        if known is None:
            known = self._mixes[mix] = self._merged(self._pristine, mix, experts)
            if len(self._mixes) > _MIXES:
                self._mixes.popitem(last=False)
        self._mixes.move_to_end(mix)
        return known

    @torch.inference_mode()
    def stacked(
        self, spans: Items[Span], experts: Mapping[str, DecodedExpert], out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The vectors of the spans' mixes: `[spans, nbytes]` uint8."""
        return torch.stack([self.of(span.mix, experts) for span in spans], out=out)

    def at(self, site: int, stacked: torch.Tensor, which: torch.Tensor) -> Vectors:
        """One site's of several mixes', as views.

        Args:
            stacked: `[choices, nbytes]` uint8.
            which: of each row, the mix.
        """
        return Vectors({a: place.within(stacked) for a, place in self._places[site].items()}, which)

    def _as_loaded(self) -> torch.Tensor:
        packed = torch.zeros(self.nbytes, dtype=torch.uint8, device=self.device)
        for own in self._places:
            for place in own.values():
                if not place.shift:
                    place.within(packed).copy_(self._parameters[place.name].data)
        return packed

    def _merged(self, as_loaded: torch.Tensor, mix: Mix, experts: Mapping[str, DecodedExpert]) -> torch.Tensor:
        packed = as_loaded.clone()
        for own in self._places:
            for place in own.values():
                terms = terms_of(mix, place.name, experts)
                if not terms:
                    continue
                pristine, into = self._parameters[place.name].data, place.within(packed)
                if place.shift:
                    made = torch.empty_like(pristine)
                    self._kernels.merge(made, pristine, terms)
                    torch.sub(made, pristine, out=into)
                else:
                    self._kernels.merge(into, pristine, terms)
        return packed


def rows_of(spans: Items[Span]) -> npt.NDArray[np.int64]:
    """Of each row, the place of its span."""
    return np.repeat(np.arange(len(spans), dtype=np.int64), [span.stop - span.start for span in spans])
