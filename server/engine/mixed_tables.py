"""What the kernels' tables say of experts, matrix by matrix, read once for as long as an expert is on the device."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from weakref import WeakKeyDictionary

import numpy as np

from server.engine.expert import DecodedExpert
from server.engine.kernels.gpu_batches import BatchTables, ExpertRows, Integers, expert_rows
from server.engine.layout import Span
from server.engine.sites import Kind, Site


class MatrixTables:
    """Makes the tables of all linear layers at once.

    Attributes:
        sites: of all sites those of linear layers, whose matrices are counted in this order.
    """

    def __init__(self, sites: Items[Site]) -> None:
        self.sites: Integers = np.array([i for i, site in enumerate(sites) if site.kind is Kind.LINEAR], np.int64)
        self._names = [sites[i].names["weight"] for i in self.sites]
        self._known: WeakKeyDictionary[DecodedExpert, ExpertRows] = WeakKeyDictionary()

    def of(
        self,
        spans: Items[Span],
        experts: Mapping[str, DecodedExpert],
        matrices: Integers | None = None,
        *,
        padded: bool = False,
    ) -> BatchTables:
        """The tables by which the spans' rows get their mixes.

        Args:
            spans: disjoint and ascending.
            experts: at least every expert of their mixes, by digest.
            matrices: which of them; None is all.
            padded: to few sizes.
        """
        numbers: dict[str, int] = {}
        parts = [
            (
                span.start,
                span.stop,
                tuple((weight, numbers.setdefault(digest, len(numbers))) for digest, weight in span.mix.parts),
            )
            for span in spans
        ]
        rows = [self._rows(experts[digest]) for digest in numbers]
        chosen = np.arange(len(self._names)) if matrices is None else matrices
        return BatchTables(rows, parts, chosen, padded=padded)

    def _rows(self, expert: DecodedExpert) -> ExpertRows:
        known = self._known.get(expert)
        if known is None:
            known = self._known[expert] = expert_rows([expert.tensors.get(name) for name in self._names])
        return known
