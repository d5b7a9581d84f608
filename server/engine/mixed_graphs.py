"""Experts in captured decode steps: what a graph adds beside the base lies in tensors that are rewritten in place.

A launch of a kernel depends on how many chunks of rows it has and of which kind they are; which rows, which experts
and where these lie in memory stands in tables that it reads. Tables are padded with chunks of no rows to a few sizes,
so that few graphs serve all steps: another expert in the same place, or another row, is another content of the same
tables, sent in one copy. Norms and biases of the step's mixes are copied into tensors of their own. Rows of embeddings
are moved before the graph runs, which then looks them up in a table of the step's rows.

Only Triton's kernels read tables from the device. What they do not do in one kind of launch per group (terms of several
forms, dense matrices), and norms that cannot be computed row by row, is not captured.
"""

from __future__ import annotations

from collections.abc import Hashable
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from server.engine.forwards import Forward, Vectors, linear, looked_up, moved_rows, rowwise
from server.engine.kernels import Kernels
from server.engine.mixed import SiteTerms, Terms
from server.engine.sites import Kind, Site

if TYPE_CHECKING:
    from server.engine.kernels.gpu_tables import Launch

_CPU = torch.device("cpu")
Launches = tuple[tuple["Launch", ...], ...]
"""Of every site, with padded tables on the CPU."""


@dataclass(frozen=True, eq=False)
class Form:
    """How a step's terms are launched: steps of one key differ in the contents of their tables alone."""

    key: Hashable
    launches: Launches


class MixedForms:
    """Finds the forms of steps, for the kernels that read their tables from the device."""

    def __init__(self, kernels: Kernels) -> None:
        """Args:
        kernels: `TritonKernels`.
        """
        self.kernels: Any = kernels
        self._known: WeakKeyDictionary[Terms, tuple[int, Form | None]] = WeakKeyDictionary()

    def of(self, terms: Terms, rows: int) -> Form | None:
        """The form of a step whose batch is padded to so many rows; None if it cannot be captured."""
        known = self._known.get(terms)
        if known is None or known[0] != rows:
            known = self._known[terms] = (rows, self._form(terms, rows))
        return known[1]

    def _form(self, terms: Terms, rows: int) -> Form | None:
        keys: list[Hashable] = []
        launches: list[tuple[Launch, ...]] = []
        for site, found in terms.sites:
            own = self._launches(site, found, rows)
            if own is None:
                return None
            kinds = [(launch.sparse, launch.tile, launch.chunks, launch.one, launch.levels) for launch in own]
            sizes = [len(launch.table) for launch in own]
            keys.append((id(site), found.vectors is None, *kinds, *sizes))
            launches.append(own)
        return Form(tuple(keys), tuple(launches))

    def _launches(self, site: Site, found: SiteTerms, rows: int) -> tuple[Launch, ...] | None:
        from server.engine.kernels.gpu_tables import make_plan

        if site.kind is Kind.VECTOR:
            return () if site.broadcasts else None
        if site.kind is Kind.EMBEDDING or not found.groups:
            return ()
        shape = found.groups[0].terms[0][1].shape
        fused = self.kernels.fuse_rows
        if shape[1] == 1 or any(fused is not None and g.stop - g.start >= fused for g in found.groups):
            return None
        plan = make_plan(found.groups, rows, (shape[0], shape[1]), _CPU)
        # In an order that does not depend on who comes first: they add to different rows.
        ordered = sorted(plan.launches, key=lambda launch: (launch.sparse, launch.tile))
        return None if plan.wide else tuple(padded(launch) for launch in ordered)


def padded(launch: Launch) -> Launch:
    """The same launch with chunks of no rows and terms that no chunk has, to one of few sizes."""
    from server.engine.kernels.gpu_tables import CHUNK_FIELDS, TERM_FIELDS

    terms = launch.terms
    chunks = _power(launch.chunks)
    count = _power(len(terms) // TERM_FIELDS)
    table = torch.zeros(chunks * CHUNK_FIELDS + count * TERM_FIELDS, dtype=torch.int64)
    table[: launch.chunks * CHUNK_FIELDS] = launch.table[: launch.chunks * CHUNK_FIELDS]
    table[chunks * CHUNK_FIELDS :][: len(terms)] = terms
    return replace(launch, chunks=chunks, table=table)


def _power(count: int) -> int:
    return 1 << (count - 1).bit_length()


class HeldTerms:
    """The tensors in which one captured step finds its terms.

    Attributes:
        plan: modules and what they compute in that step, from these tensors.
    """

    def __init__(self, terms: Terms, form: Form, rows: int, kernels: Any, device: torch.device) -> None:
        size = sum(len(launch.table) for own in form.launches for launch in own)
        self._host = torch.zeros(size, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._tables = torch.zeros(size, dtype=torch.int64, device=device)
        self._kernels = kernels
        self._vectors: list[Vectors | None] = []
        self._moved: list[torch.Tensor | None] = []
        self._filled: Form | None = None
        self.plan: list[tuple[nn.Module, Forward]] = []
        start = 0
        for (site, found), own in zip(terms.sites, form.launches, strict=True):
            fixed = []
            for launch in own:
                stop = start + len(launch.table)
                fixed.append(replace(launch, table=self._tables[start:stop]))
                start = stop
            self.plan.append((site.module, self._forward(site, found, fixed, rows)))

    def _forward(self, site: Site, found: SiteTerms, launches: Items[Launch], rows: int) -> Forward:
        vectors = None if found.vectors is None else _room(found.vectors, rows)
        self._vectors.append(vectors)
        table = None
        if site.kind is Kind.EMBEDDING:
            weight = site.module.get_parameter("weight")
            table = weight.data.new_zeros(rows, weight.shape[1])
        self._moved.append(table)
        if table is not None:
            return looked_up(site, lambda _: table)
        if site.kind is Kind.VECTOR:
            assert vectors is not None
            return rowwise(site, vectors)

        def add(y: torch.Tensor, x: torch.Tensor) -> None:
            for launch in launches:
                self._kernels._add(launch, y, x)

        return linear(site.module.forward, add, vectors)

    def fill(self, terms: Terms, form: Form, ids: torch.Tensor) -> None:
        """Take in a step of the same form.

        Args:
            ids: `[rows]` int64, its tokens.
        """
        for (site, found), table in zip(terms.sites, self._moved, strict=True):
            if table is not None:
                table.copy_(moved_rows(site.module, found.groups, ids))
        if self._filled is form:
            return
        for (_, found), vectors in zip(terms.sites, self._vectors, strict=True):
            if vectors is not None and found.vectors is not None:
                for name, choices in found.vectors.choices.items():
                    vectors.choices[name][: len(choices)] = choices
                vectors.which[: len(found.vectors.which)] = found.vectors.which
                vectors.which[len(found.vectors.which) :] = 0
        if len(self._host):
            torch.cat([launch.table for own in form.launches for launch in own], out=self._host)
            self._tables.copy_(self._host, non_blocking=True)
        self._filled = form


def _room(vectors: Vectors, rows: int) -> Vectors:
    """For as many mixes as there may be in so many rows."""
    choices = {name: choice.new_zeros(rows, choice.shape[1]) for name, choice in vectors.choices.items()}
    return Vectors(choices, vectors.which.new_zeros(rows))
