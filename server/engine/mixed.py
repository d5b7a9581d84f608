"""Mixed mode: rows with different mixes in one step.

The base's product is computed once for all rows; then each mix's deltas are added to its own rows, read in packed
form: y = x Wᵀ + Σ weightₖ · x Δₖᵀ. Where that is faster, rows of a prompt are multiplied with moved weights instead,
y = x (W + Σ weightₖ · Δₖ)ᵀ: one product, not two. Biases, norms, embeddings and the head carry deltas too. For the
length of a step the modules that have something to add get another `forward`; a step without deltas runs the model as
it was loaded.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Items
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from server.engine.expert import DecodedExpert
from server.engine.forwards import Forward, Vectors, linear, looked_up, moved_rows, rowwise, running, spanwise
from server.engine.kernels import Group, Kernels, Overwrites, Term
from server.engine.kernels.gpu_tables import Launch
from server.engine.layout import Span
from server.engine.merged import terms_of
from server.engine.mixed_tables import MatrixTables
from server.engine.mixed_vectors import Flags, PackedVectors, rows_of
from server.engine.sites import Kind, Site
from store.mix import Mix


@dataclass(frozen=True, eq=False)
class Terms:
    """What a step adds: its rows, their mixes, and the experts of these.

    Attributes:
        spans: all rows of the step.
        logit_spans: the rows whose logits are wanted.
        experts: every expert of the spans' mixes, by digest.
        weights: what they are added to.
    """

    spans: tuple[Span, ...]
    logit_spans: tuple[Span, ...]
    experts: Mapping[str, DecodedExpert]
    weights: MixedWeights

    def at(self, site: Site) -> tuple[Span, ...]:
        """The rows that a site sees."""
        return self.logit_spans if site.head else self.spans

    def groups(self, site: Site, least: int = 0) -> tuple[Group, ...]:
        """Rows with deltas of a site's matrix, of mixes that have at least so many rows there."""
        return tuple(
            Group(span.start, span.stop, tuple(terms))
            for span in self.at(site)
            if span.stop - span.start >= least and (terms := _beside(span.mix, site.names["weight"], self.experts))
        )

    def moved(self) -> Flags:
        """`[sites]`: where vectors are moved, or rows of embeddings."""
        moved = np.zeros(len(self.weights.sites), np.bool_)
        for expert in self.experts.values():
            moved |= self.weights.vectors.moved(expert)
        for index in self.weights.embeddings:
            name = self.weights.sites[index].names["weight"]
            moved[index] = any(name in expert.tensors for expert in self.experts.values())
        return moved


class MixedWeights:
    """Applies mixes beside the weights, which must be the pristine ones.

    Attributes:
        sites: where.
        embeddings: the places of embeddings among these.
        vectors: norms and biases of mixes.
        tables: what kernels' tables say of experts.
        seconds: time spent on deltas. On a GPU, time to launch them.
    """

    def __init__(
        self, sites: Items[Site], unserved: set[str], parameters: Mapping[str, nn.Parameter], kernels: Kernels
    ) -> None:
        """Args:
        sites, unserved: as `find_sites` gives them for the model.
        parameters: checkpoint name → parameter.
        """
        self.sites = sites
        self.embeddings = [index for index, site in enumerate(sites) if site.kind is Kind.EMBEDDING]
        self.vectors = PackedVectors(sites, parameters, kernels)
        self.tables = MatrixTables(sites)
        self._unserved = unserved
        self._kernels = kernels
        self._launching: Any = kernels if kernels.name == "triton" else None
        """The kernels, if they take tables that are there already, and tell which groups are better off fused."""
        self._carried: WeakKeyDictionary[DecodedExpert, bool] = WeakKeyDictionary()
        self._terms: Terms | None = None
        self._plan: list[tuple[nn.Module, Forward]] | None = None
        self.seconds = 0.0

    def carries(self, expert: DecodedExpert) -> bool:
        """Whether everything the expert moves can be applied row by row. What overwrites cannot: a sum in floats would
        not give its fine-tune's bits, so it is always merged."""
        known = self._carried.get(expert)
        if known is None:
            overwrites = any(isinstance(delta, Overwrites) for delta in expert.tensors.values())
            known = self._carried[expert] = not overwrites and self._unserved.isdisjoint(expert.tensors)
        return known

    def forget(self) -> None:
        """Let go of the experts of the last step, so that they can leave memory."""
        self._terms = self._plan = None

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
            self._plan = list(self._prepare(terms))
        with running(self._plan):
            yield

    def terms(
        self, spans: tuple[Span, ...], logit_spans: tuple[Span, ...], experts: Mapping[str, DecodedExpert]
    ) -> Terms:
        """What such a step adds: the same object as before, for the same rows."""
        known = self._terms
        if known is None or (known.spans, known.logit_spans) != (spans, logit_spans):
            self.forget()
            own = {digest: experts[digest] for span in (*spans, *logit_spans) for digest, _ in span.mix.parts}
            known = self._terms = Terms(spans, logit_spans, own, self)
        return known

    def _prepare(self, terms: Terms) -> Iterator[tuple[nn.Module, Forward]]:
        moved = terms.moved()
        both = ((False, terms.spans), (True, terms.logit_spans))
        stacked = {head: self._stacked(spans, terms) for head, spans in both if spans and moved.any()}
        fused = {index: groups for index, site in enumerate(self.sites) if (groups := self._large(site, terms))}
        launches = self._launches(terms, fused)
        for index, site in enumerate(self.sites):
            if not terms.at(site):
                continue
            vectors = None
            if moved[index] and site.kind is not Kind.EMBEDDING:
                vectors = self.vectors.at(index, *stacked[site.head])
            if site.kind is Kind.VECTOR:
                if vectors is not None:
                    made = rowwise(site, vectors) if site.broadcasts else spanwise(site, terms.at(site), vectors)
                    yield site.module, made
            elif site.kind is Kind.EMBEDDING:
                if moved[index]:
                    yield site.module, self._embedding(site, terms.groups(site))
            else:
                ready, large = launches.get(index), fused.get(index, ())
                others, starts = terms.groups(site) if ready is None else (), _starts(large)
                small = [group for group in others if group.start not in starts]
                if ready or large or small or vectors is not None:
                    yield site.module, self._linear(site, large, small, ready or (), vectors)

    def _large(self, site: Site, terms: Terms) -> tuple[Group, ...]:
        """What a layer multiplies with moved weights."""
        least = self._kernels.fuse_rows
        if least is None or type(site.module).forward is not nn.Linear.forward:
            return ()
        groups = terms.groups(site, least)
        return groups if self._launching is None else tuple(filter(self._launching.fuses, groups))

    def _launches(self, terms: Terms, fused: Mapping[int, Items[Group]]) -> dict[int, tuple[Launch, ...]]:
        """Layers, by their places, whose other rows take launches alone, and these: all of their tables are made at
        once and sent in one copy. None for kernels that take no tables.

        Args:
            fused: by place, what is multiplied with moved weights.
        """
        if self._launching is None:
            return {}
        alike: dict[tuple[bool, frozenset[int]], list[int]] = {}
        for matrix, index in enumerate(self.tables.sites.tolist()):
            alike.setdefault((self.sites[index].head, _starts(fused.get(index, ()))), []).append(matrix)
        batches = []
        for (head, starts), matrices in alike.items():
            spans = terms.logit_spans if head else terms.spans
            few = [span for span in spans if span.start not in starts]
            batches.append(self.tables.of(few, terms.experts, np.array(matrices, np.int64)))
        tables = np.empty(sum(batch.size for batch in batches), np.int64)
        edges = np.cumsum([0, *(batch.size for batch in batches)]).tolist()
        for batch, start, stop in zip(batches, edges[:-1], edges[1:], strict=True):
            batch.fill(tables[start:stop])
        sent = torch.from_numpy(tables).to(self.vectors.device, non_blocking=True)
        found: dict[int, tuple[Launch, ...]] = {}
        for matrices, batch, start, stop in zip(alike.values(), batches, edges[:-1], edges[1:], strict=True):
            for index, own in zip(self.tables.sites[matrices].tolist(), batch.launches(sent[start:stop]), strict=True):
                if own is not None:
                    found[index] = own
        return found

    def _stacked(self, spans: Items[Span], terms: Terms) -> tuple[torch.Tensor, torch.Tensor]:
        stacked = self.vectors.stacked(spans, terms.experts)
        return stacked, torch.from_numpy(rows_of(spans)).to(stacked.device, non_blocking=True)

    def _embedding(self, site: Site, groups: Items[Group]) -> Forward:
        def table(tokens: torch.Tensor) -> torch.Tensor:
            started = time.perf_counter()
            made = moved_rows(site.module, groups, tokens)
            self.seconds += time.perf_counter() - started
            return made

        return looked_up(site, table)

    def _linear(
        self,
        site: Site,
        large: Items[Group],
        small: Items[Group],
        launches: Items[Launch],
        vectors: Vectors | None,
    ) -> Forward:
        """Rows of `large` are multiplied with moved weights; those of `small`, or of the launches, are added to."""
        plain = self._fused(site.module, large) if large else site.module.forward

        def added(rows: torch.Tensor, x: torch.Tensor) -> None:
            started = time.perf_counter()
            if launches:
                self._launching.add_launches(rows, x, launches)
            if small:
                self._kernels.add_linear(rows, x, small)
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


def _beside(mix: Mix, name: str, experts: Mapping[str, DecodedExpert]) -> list[Term]:
    """What kernels add for a mix whose experts `MixedWeights.carries`."""
    return [(weight, delta) for weight, delta in terms_of(mix, name, experts) if not isinstance(delta, Overwrites)]


def _starts(groups: Items[Group]) -> frozenset[int]:
    """First rows, by which groups of one step are told apart."""
    return frozenset(group.start for group in groups)


def _between(groups: Items[Group], rows: int) -> list[slice]:
    """The rows that are in none of the groups, which are disjoint and ascending."""
    edges = [0, *(edge for group in groups for edge in (group.start, group.stop)), rows]
    return [slice(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]
