"""Mixed mode: rows with different mixes in one step.

The base's product is computed once for all rows; then each mix's deltas are added to its own rows, read in packed
form: y = x Wᵀ + Σ weightₖ · x Δₖᵀ. Where that is faster, rows of a prompt are multiplied with moved weights instead,
y = x (W + Σ weightₖ · Δₖ)ᵀ: one product, not two. Biases, norms, embeddings and the head carry deltas too. For the
length of a step the modules that have something to add get another `forward`; a step without deltas runs the model as
it was loaded.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Items
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from server.engine.expert import DecodedExpert
from server.engine.kernels import Group, Kernels, Overwrites, Term, gather_rows
from server.engine.layout import Span
from server.engine.merged import terms_of
from server.engine.sites import Kind, Site, per_row, swapped
from store.mix import Mix

Forward = Callable[[torch.Tensor], torch.Tensor]

_VECTOR_MIXES = 64
"""Mixes whose merged norms and biases are kept, least recently used first out: vectors are small."""


@dataclass(frozen=True)
class _Vectors:
    """The values of one module's vectors for the spans of a step: `choices[name][which[row]]`."""

    choices: Mapping[str, torch.Tensor]
    which: torch.Tensor


class MixedWeights:
    """Applies mixes beside the weights, which must be the pristine ones.

    Attributes:
        seconds: time spent on deltas. On a GPU, time to launch them.
    """

    def __init__(
        self, sites: Items[Site], unserved: set[str], parameters: Mapping[str, nn.Parameter], kernels: Kernels
    ) -> None:
        """Args:
        sites, unserved: as `find_sites` gives them for the model.
        parameters: checkpoint name → parameter.
        """
        self._sites = sites
        self._unserved = unserved
        self._parameters = parameters
        self._kernels = kernels
        self._merged_vectors: OrderedDict[Mix, dict[str, torch.Tensor]] = OrderedDict()
        self._planned_for: tuple[tuple[Span, ...], tuple[Span, ...]] | None = None
        self._plan: list[tuple[nn.Module, Forward]] = []
        self.seconds = 0.0

    def carries(self, expert: DecodedExpert) -> bool:
        """Whether everything the expert moves can be applied row by row. What overwrites cannot: a sum in floats would
        not give its fine-tune's bits, so it is always merged."""
        overwrites = any(isinstance(delta, Overwrites) for delta in expert.tensors.values())
        return not overwrites and self._unserved.isdisjoint(expert.tensors)

    def forget(self) -> None:
        """Let go of the experts of the last step, so that they can leave memory."""
        self._planned_for, self._plan = None, []

    @contextmanager
    def carrying(
        self, spans: tuple[Span, ...], logit_spans: tuple[Span, ...], experts: Mapping[str, DecodedExpert]
    ) -> Iterator[None]:
        """Within, the model's forward applies each span's mix to its rows.

        Args:
            spans: all rows of the step.
            logit_spans: the rows whose logits are wanted.
            experts: at least every expert of the spans' mixes, by digest.
        """
        if self._planned_for != (spans, logit_spans):
            self.forget()
            self._plan = list(self._prepare(spans, logit_spans, experts))
            self._planned_for = (spans, logit_spans)
        try:
            for module, forward in self._plan:
                module.forward = forward
            yield
        finally:
            for module, _ in self._plan:
                module.__dict__.pop("forward", None)

    def _prepare(
        self, spans: Items[Span], logit_spans: Items[Span], experts: Mapping[str, DecodedExpert]
    ) -> Iterator[tuple[nn.Module, Forward]]:
        for site in self._sites:
            here = logit_spans if site.head else spans
            digests = {digest for span in here for digest, _ in span.mix.parts}
            moved = {n for n in site.names.values() if any(n in experts[digest].tensors for digest in digests)}
            if not moved:
                continue
            if site.kind is Kind.VECTOR:
                forward = self._vector(site, here, self._vectors(site, here, experts))
            else:
                weight = site.names["weight"]
                groups = [
                    Group(span.start, span.stop, tuple(terms))
                    for span in here
                    if (terms := _beside(span.mix, weight, experts))
                ]
                if site.kind is Kind.EMBEDDING:
                    forward = self._embedding(site, groups)
                else:
                    biases = {a: n for a, n in site.names.items() if a != "weight"}
                    vectors = self._vectors(site, here, experts) if moved & set(biases.values()) else None
                    forward = self._linear(site, groups, vectors)
            yield site.module, forward

    def _linear(self, site: Site, groups: Items[Group], vectors: _Vectors | None) -> Forward:
        module = site.module
        add, least = self._kernels.add_linear, self._kernels.fuse_rows
        plain: Forward = module.forward
        if least is not None and type(module).forward is nn.Linear.forward:
            large = [group for group in groups if group.stop - group.start >= least]
            if large:
                plain = self._fused(module, large)
                groups = [group for group in groups if group not in large]
        # The difference to the pristine bias, which `plain` has added already.
        shift = None if vectors is None else vectors.choices["bias"] - self._parameters[site.names["bias"]].data

        def forward(x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = plain(x)
            started = time.perf_counter()
            rows = y.view(-1, y.shape[-1])
            if shift is not None and vectors is not None:
                rows += shift.index_select(0, vectors.which)
            if groups:
                add(rows, x.reshape(-1, x.shape[-1]), groups)
            self.seconds += time.perf_counter() - started
            return y

        return forward

    def _fused(self, module: nn.Module, groups: Items[Group]) -> Forward:
        """The base's product with the deltas of these groups in their rows, whose products are not taken twice."""

        def forward(x: torch.Tensor) -> torch.Tensor:
            weight, bias = module.get_parameter("weight").data, module._parameters.get("bias")
            own = None if bias is None else bias.data
            rows = x.reshape(-1, x.shape[-1])
            y = x.new_empty(len(rows), len(weight))
            others = _between(groups, len(rows))
            if others:  # in one product, which reads the weights once
                made = nn.functional.linear(torch.cat([rows[other] for other in others]), weight, own)
                done = 0
                for other in others:
                    count = other.stop - other.start
                    y[other] = made[done : done + count]
                    done += count
            started = time.perf_counter()
            self._kernels.fused_linear(y, rows, weight, own, groups)
            self.seconds += time.perf_counter() - started
            return y.view(*x.shape[:-1], -1)

        return forward

    def _embedding(self, site: Site, groups: Items[Group]) -> Forward:
        """Looks up in a table of the step's own rows, moved: whatever the module does to what it finds still holds."""
        module = site.module
        assert isinstance(module, nn.Embedding)
        plain, parameter = module.forward, module.get_parameter("weight")

        def forward(ids: torch.Tensor) -> torch.Tensor:
            started = time.perf_counter()
            tokens = ids.view(-1)
            table = parameter.data.index_select(0, tokens)
            for group in groups:
                rows = slice(group.start, group.stop)
                moved = table[rows].float()
                for weight, delta in group.terms:
                    moved += weight * gather_rows(delta, tokens[rows])
                table[rows] = moved.to(table.dtype)
            self.seconds += time.perf_counter() - started
            padding, module.padding_idx = (
                module.padding_idx,
                None,
            )  # only gradients need it, and it may exceed the table
            try:
                with swapped({"weight": parameter}, {"weight": table}):
                    found: torch.Tensor = plain(torch.arange(len(tokens), device=ids.device).view_as(ids))
                return found
            finally:
                module.padding_idx = padding

        return forward

    def _vector(self, site: Site, spans: Items[Span], vectors: _Vectors) -> Forward:
        plain, axis = site.module.forward, site.axis
        parameters = {name: site.module.get_parameter(name) for name in site.names}
        choices, which = vectors.choices, vectors.which

        def rowwise(x: torch.Tensor) -> torch.Tensor:
            values = {name: per_row(choice, which, axis, x.ndim) for name, choice in choices.items()}
            with swapped(parameters, values):
                result: torch.Tensor = plain(x)
            return result

        def spanwise(x: torch.Tensor) -> torch.Tensor:
            parts = []
            for place, span in enumerate(spans):
                with swapped(parameters, {name: choice[place] for name, choice in choices.items()}):
                    parts.append(plain(x.narrow(axis, span.start, span.stop - span.start)))
            return torch.cat(parts, dim=axis)

        return rowwise if site.broadcasts else spanwise

    def _vectors(self, site: Site, spans: Items[Span], experts: Mapping[str, DecodedExpert]) -> _Vectors:
        names = {attribute: name for attribute, name in site.names.items() if self._parameters[name].ndim == 1}
        merged = [self._merged(span.mix, names.values(), experts) for span in spans]
        device = next(self._parameters[name].device for name in names.values())
        lengths = torch.tensor([span.stop - span.start for span in spans])
        which = torch.repeat_interleave(torch.arange(len(spans)), lengths).to(device)
        choices = {a: torch.stack([values[name] for values in merged]) for a, name in names.items()}
        return _Vectors(choices, which)

    def _merged(self, mix: Mix, names: Iterable[str], experts: Mapping[str, DecodedExpert]) -> dict[str, torch.Tensor]:
        """These vectors as the mix has them."""
        known = self._merged_vectors.setdefault(mix, {})
        self._merged_vectors.move_to_end(mix)
        if len(self._merged_vectors) > _VECTOR_MIXES:
            self._merged_vectors.popitem(last=False)
        for name in names:
            if name not in known:
                pristine = self._parameters[name].data
                terms = terms_of(mix, name, experts)
                if terms:
                    known[name] = torch.empty_like(pristine)
                    self._kernels.merge(known[name], pristine, terms)
                else:
                    known[name] = pristine
        return known


def _beside(mix: Mix, name: str, experts: Mapping[str, DecodedExpert]) -> list[Term]:
    """What kernels add for a mix whose experts `MixedWeights.carries`."""
    return [(weight, delta) for weight, delta in terms_of(mix, name, experts) if not isinstance(delta, Overwrites)]


def _between(groups: Items[Group], rows: int) -> list[slice]:
    """The rows that are in none of the groups, which are disjoint and ascending."""
    edges = [0, *(edge for group in groups for edge in (group.start, group.stop)), rows]
    return [slice(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]
