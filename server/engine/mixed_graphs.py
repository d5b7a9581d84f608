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

from collections.abc import Callable, Hashable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from server.engine.bus import on, own_stream
from server.engine.forwards import Forward, Vectors, linear, looked_up, moved_rows, rowwise
from server.engine.kernels import Kernels
from server.engine.kernels.gpu_batches import BatchTables
from server.engine.kernels.gpu_tables import Launch
from server.engine.mixed import MixedWeights, Terms
from server.engine.mixed_vectors import Flags, rows_of
from server.engine.sites import Kind, Site
from store.mix import Mix


@dataclass(frozen=True, eq=False)
class Form:
    """How a step's terms are launched: steps of one key differ in the contents of their tables alone.

    Attributes:
        moved: `[sites]`, where there are vectors or embeddings of experts.
    """

    key: Hashable
    tables: BatchTables
    moved: Flags


class MixedForms:
    """Finds the forms of steps, for the kernels that read their tables from the device."""

    def __init__(self, kernels: Kernels, most_rows: int) -> None:
        """Args:
        kernels: `TritonKernels`.
        most_rows: of a step.
        """
        self.kernels: Any = kernels
        self.room = VectorRoom(most_rows)
        self.aside = Aside(most_rows, kernels)
        self._known: WeakKeyDictionary[Terms, Form | None] = WeakKeyDictionary()

    def of(self, terms: Terms) -> Form | None:
        """The form of a decode step; None if it cannot be captured."""
        if terms not in self._known:
            self._known[terms] = self._form(terms)
        return self._known[terms]

    def _form(self, terms: Terms) -> Form | None:
        sites, fused = terms.weights.sites, self.kernels.fuse_rows
        if any(not s.mix.is_base and fused is not None and s.stop - s.start >= fused for s in terms.spans):
            return None
        moved = terms.moved()
        if any(sites[i].kind is Kind.VECTOR and not sites[i].broadcasts for i in np.flatnonzero(moved).tolist()):
            return None
        tables = terms.weights.tables.of(terms.spans, terms.experts, padded=True)
        return Form((tables.key, moved.tobytes()), tables, moved) if tables.complete else None


class Aside:
    """Where all captured steps compute what experts add, on a stream of its own while the base's product is computed:
    a few short kernels, each of which waits for the one before, beside one that only waits for memory."""

    overlaps = True

    def __init__(self, most_rows: int, kernels: Kernels) -> None:
        self._kernels: Any = kernels
        self._most_rows = most_rows
        self._most_size = 0
        self._sums: torch.Tensor | None = None
        self._stream: torch.cuda.Stream | None = None

    def prepare(self, weights: MixedWeights) -> None:
        """Know how much memory any product takes: it is taken once, as captured steps know where it is."""
        sizes = (site.module.out_features for site in weights.sites if isinstance(site.module, nn.Linear))
        self._most_size = max(sizes, default=0)

    def product(
        self, plain: Forward, x: torch.Tensor, size: int, add: Callable[[torch.Tensor, torch.Tensor], None]
    ) -> torch.Tensor:
        """`plain(x)`, and in the same rows what `add(y, x)` adds to zeros; the sum is rounded once more. Zeros are left
        behind for the next product.

        Args:
            size: columns of the product.
        """
        rows = x.reshape(-1, x.shape[-1])
        if self._sums is None:
            self._sums = x.new_zeros(self._most_rows * self._most_size)
            if self.overlaps and x.is_cuda:
                self._stream = own_stream("what experts add", x.device)
        sums = self._sums[: len(rows) * size].view(len(rows), size)
        try:
            y = self._added(plain, x, lambda: add(sums, rows))
            self._kernels.absorb(y.view(-1, size), sums)
        except Exception:
            sums.zero_()  # whatever came of it: a later step, or a captured one, expects nothing else
            raise
        return y

    def _added(self, plain: Forward, x: torch.Tensor, add: Callable[[], None]) -> torch.Tensor:
        """`plain(x)`, and what `add` does at the same time."""
        if self._stream is None:
            add()
            return plain(x)
        current = torch.cuda.current_stream(x.device)
        self._stream.wait_stream(current)
        try:
            with on(self._stream):
                add()
            return plain(x)
        finally:  # a capture cannot end while it is on two streams, not even one that has failed
            current.wait_stream(self._stream)


class VectorRoom:
    """Where all captured steps find the norms and biases of their mixes, one after the other: no two run at once."""

    def __init__(self, most_mixes: int) -> None:
        self._most_mixes = most_mixes
        self._stacked: torch.Tensor | None = None
        self._mixes: list[Mix] = []

    def stacked(self, weights: MixedWeights) -> torch.Tensor:
        """`[most mixes, bytes]` uint8, at the same address every time."""
        if self._stacked is None:
            own = weights.vectors
            self._stacked = torch.zeros(self._most_mixes, own.nbytes, dtype=torch.uint8, device=own.device)
        return self._stacked

    def fill(self, terms: Terms) -> None:
        """Take in the vectors of a step's mixes."""
        mixes = [span.mix for span in terms.spans]
        if mixes != self._mixes:
            # Nothing is certain if this fails half-way.
            self._mixes = []
            terms.weights.vectors.stacked(terms.spans, terms.experts, self.stacked(terms.weights)[: len(mixes)])
            self._mixes = mixes


class HeldTerms:
    """The tensors in which one captured step finds its terms.

    Attributes:
        plan: modules and what they compute in that step, from these tensors.
    """

    def __init__(self, terms: Terms, form: Form, rows: int, forms: MixedForms, device: torch.device) -> None:
        size = form.tables.size + rows
        self._host = torch.zeros(size, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._device = torch.zeros(size, dtype=torch.int64, device=device)
        self._which = self._device[form.tables.size :]
        self._kernels = forms.kernels
        self._room = forms.room
        self._aside = forms.aside
        self._aside.prepare(terms.weights)
        self._embeddings: list[tuple[Site, torch.Tensor]] = []
        self._filled: Form | None = None
        self.plan: list[tuple[nn.Module, Forward]] = []
        weights = terms.weights
        launches = dict(zip(weights.tables.sites, form.tables.launches(self._device), strict=True))
        for index, site in enumerate(weights.sites):
            vectors = None
            if form.moved[index] and site.kind is not Kind.EMBEDDING:
                vectors = weights.vectors.at(index, self._room.stacked(weights), self._which)
            if form.moved[index] or launches.get(index):
                self.plan.append((site.module, self._forward(site, vectors, launches.get(index) or (), rows)))

    def _forward(self, site: Site, vectors: Vectors | None, launches: Items[Launch], rows: int) -> Forward:
        if site.kind is Kind.EMBEDDING:
            weight = site.module.get_parameter("weight")
            table = weight.data.new_zeros(rows, weight.shape[1])
            self._embeddings.append((site, table))
            return looked_up(site, lambda _: table)
        if site.kind is Kind.VECTOR:
            assert vectors is not None
            return rowwise(site, vectors)

        base, module = site.module.forward, site.module
        assert isinstance(module, nn.Linear)

        def add(y: torch.Tensor, x: torch.Tensor) -> None:
            self._kernels.add_launches(y, x, launches)

        def plain(x: torch.Tensor) -> torch.Tensor:
            return self._aside.product(base, x, module.out_features, add)

        return linear(plain if launches else base, _nothing, vectors)

    def fill(self, terms: Terms, form: Form, ids: torch.Tensor) -> None:
        """Take in a step of the same form.

        Args:
            ids: `[rows]` int64, its tokens.
        """
        for site, table in self._embeddings:
            table.copy_(moved_rows(site.module, terms.groups(site), ids))
        if form.moved.any():
            self._room.fill(terms)
        if self._filled is form:
            return
        tables, size = self._host.numpy(), form.tables.size
        form.tables.fill(tables[:size])
        which = rows_of(terms.spans)
        tables[size : size + len(which)] = which
        tables[size + len(which) :] = 0
        self._device.copy_(self._host, non_blocking=True)
        self._filled = form


def _nothing(y: torch.Tensor, x: torch.Tensor) -> None:
    """What is added has been."""
