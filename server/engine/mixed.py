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
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Items
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from server.engine.expert import DecodedExpert
from server.engine.forwards import Forward, Vectors, linear, looked_up, moved_rows, rowwise, running, spanwise
from server.engine.kernels import Group, Kernels, Overwrites, Term
from server.engine.layout import Span
from server.engine.merged import terms_of
from server.engine.sites import Kind, Site
from store.mix import Mix

_VECTOR_MIXES = 64
"""Mixes whose merged norms and biases are kept, least recently used first out: vectors are small."""


@dataclass(frozen=True, eq=False)
class SiteTerms:
    """What a step adds at one module.

    Attributes:
        groups: rows with deltas of its matrix.
        vectors: of a norm its vectors; of a linear layer what its bias is moved by; None where they are the base's.
    """

    groups: tuple[Group, ...]
    vectors: Vectors | None


@dataclass(frozen=True, eq=False)
class Terms:
    """What a step adds, module by module."""

    sites: tuple[tuple[Site, SiteTerms], ...] = ()


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
        self._terms: Terms = Terms()
        self._plan: list[tuple[nn.Module, Forward]] | None = None
        self.seconds = 0.0

    def carries(self, expert: DecodedExpert) -> bool:
        """Whether everything the expert moves can be applied row by row. What overwrites cannot: a sum in floats would
        not give its fine-tune's bits, so it is always merged."""
        overwrites = any(isinstance(delta, Overwrites) for delta in expert.tensors.values())
        return not overwrites and self._unserved.isdisjoint(expert.tensors)

    def forget(self) -> None:
        """Let go of the experts of the last step, so that they can leave memory."""
        self._planned_for, self._terms, self._plan = None, Terms(), None

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
        terms = self.terms(spans, logit_spans, experts)
        if self._plan is None:
            self._plan = [
                (site.module, self._forward(site, found, (spans, logit_spans))) for site, found in terms.sites
            ]
        with running(self._plan):
            yield

    def terms(
        self, spans: tuple[Span, ...], logit_spans: tuple[Span, ...], experts: Mapping[str, DecodedExpert]
    ) -> Terms:
        """What such a step adds: the same object as before, for the same rows."""
        if self._planned_for != (spans, logit_spans):
            self.forget()
            self._terms = Terms(tuple(self._prepare(spans, logit_spans, experts)))
            self._planned_for = (spans, logit_spans)
        return self._terms

    def _prepare(
        self, spans: Items[Span], logit_spans: Items[Span], experts: Mapping[str, DecodedExpert]
    ) -> Iterator[tuple[Site, SiteTerms]]:
        for site in self._sites:
            here = logit_spans if site.head else spans
            digests = {digest for span in here for digest, _ in span.mix.parts}
            moved = {n for n in site.names.values() if any(n in experts[digest].tensors for digest in digests)}
            if not moved:
                continue
            if site.kind is Kind.VECTOR:
                yield site, SiteTerms((), self._vectors(site, here, experts))
                continue
            weight = site.names["weight"]
            groups = tuple(
                Group(span.start, span.stop, tuple(terms))
                for span in here
                if (terms := _beside(span.mix, weight, experts))
            )
            shift = None
            if site.kind is Kind.LINEAR and moved - {weight}:
                vectors = self._vectors(site, here, experts)
                # The difference to the pristine bias, which the module adds by itself.
                pristine = self._parameters[site.names["bias"]].data
                shift = Vectors({"bias": vectors.choices["bias"] - pristine}, vectors.which)
            yield site, SiteTerms(groups, shift)

    def _forward(self, site: Site, found: SiteTerms, spans: tuple[Items[Span], Items[Span]]) -> Forward:
        if site.kind is Kind.VECTOR:
            assert found.vectors is not None
            return rowwise(site, found.vectors) if site.broadcasts else spanwise(site, spans[site.head], found.vectors)
        if site.kind is Kind.LINEAR:
            return self._linear(site, found.groups, found.vectors)

        def table(tokens: torch.Tensor) -> torch.Tensor:
            started = time.perf_counter()
            made = moved_rows(site.module, found.groups, tokens)
            self.seconds += time.perf_counter() - started
            return made

        return looked_up(site, table)

    def _linear(self, site: Site, groups: Items[Group], vectors: Vectors | None) -> Forward:
        module = site.module
        add, least = self._kernels.add_linear, self._kernels.fuse_rows
        plain: Forward = module.forward
        if least is not None and type(module).forward is nn.Linear.forward:
            large = [group for group in groups if group.stop - group.start >= least]
            if large:
                plain = self._fused(module, large)
                groups = [group for group in groups if group not in large]

        def added(rows: torch.Tensor, x: torch.Tensor) -> None:
            started = time.perf_counter()
            if groups:
                add(rows, x, groups)
            self.seconds += time.perf_counter() - started

        return linear(plain, added, vectors)

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

    def _vectors(self, site: Site, spans: Items[Span], experts: Mapping[str, DecodedExpert]) -> Vectors:
        names = {attribute: name for attribute, name in site.names.items() if self._parameters[name].ndim == 1}
        merged = [self._merged(span.mix, names.values(), experts) for span in spans]
        device = next(self._parameters[name].device for name in names.values())
        lengths = torch.tensor([span.stop - span.start for span in spans])
        which = torch.repeat_interleave(torch.arange(len(spans)), lengths).to(device)
        choices = {a: torch.stack([values[name] for values in merged]) for a, name in names.items()}
        return Vectors(choices, which)

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
