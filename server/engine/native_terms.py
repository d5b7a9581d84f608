"""What a step's mixes add to native steps: of every expert all of its records; from these a batch's are gathered.

A batch changes whenever a sequence joins or leaves. What the library reads of an expert's deltas (addresses, scales)
stays the same all the while, so it is listed once per expert; a batch's lists are a few operations on whole arrays.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch

from server.engine.expert import DecodedExpert
from server.engine.kernels.cpu import TERM, CpuKernels
from server.engine.kernels.types import DenseValues, Overwrites, rows_and_columns
from server.engine.layout import Span
from server.engine.mixed import MixedWeights, Terms
from server.engine.mixed_vectors import rows_of
from server.engine.programs import DTYPES, NORM, Program, Records
from server.engine.sites import Kind


@dataclass(frozen=True)
class Beside:
    """Operations with what a step's mixes add, and what keeps it alive."""

    records: Records
    kept: tuple[object, ...]


@dataclass(frozen=True)
class _Listed:
    """Of an expert, `[products]`: its records, and where it has none, or a dense delta that the library cannot add."""

    records: npt.NDArray[np.void]
    present: npt.NDArray[np.bool_]
    is_served: bool


class NativeTerms:
    """Lists what is added to the operations of a program."""

    def __init__(self, program: Program, weights: MixedWeights, kernels: CpuKernels) -> None:
        self._weights = weights
        self._kernels = kernels
        places = {id(module): place for place, module in enumerate(program.modules) if module is not None}
        self._places = {i: places[id(site.module)] for i, site in enumerate(weights.sites) if id(site.module) in places}
        matrices = (Kind.LINEAR, Kind.EMBEDDING)
        products = [i for i, site in enumerate(weights.sites) if site.kind in matrices and i in self._places]
        self._names = [weights.sites[i].names["weight"] for i in products]
        self._at = np.array([self._places[i] for i in products], np.int64)
        self._shapes = [tuple(weights.sites[i].module.get_parameter("weight").shape) for i in products]
        self._is_head = np.array([weights.sites[i].head for i in products], np.bool_)
        served = {id(module) for module in program.modules}
        others = [site for site in weights.sites if id(site.module) not in served]
        self._unserved = {name for site in others for name in site.names.values()}
        self._listed: WeakKeyDictionary[DecodedExpert, _Listed] = WeakKeyDictionary()

    def beside(self, terms: Terms, records: Records) -> Beside | None:
        """The operations with what is added; None if something of it has no operation."""
        if not all(self._of(expert).is_served for expert in terms.experts.values()):
            return None
        own = records.copy()
        kept: list[object] = []
        for is_head, spans in ((False, terms.spans), (True, terms.logit_spans)):
            chosen = np.flatnonzero(self._is_head == is_head)
            if chosen.size and (made := self._gathered(spans, terms, chosen)) is not None:
                flat, counts = made
                own["terms"][self._at[chosen]] = flat.ctypes.data + (np.cumsum(counts) - counts) * TERM.itemsize
                own["term_count"][self._at[chosen]] = counts
                kept.append(flat)
        kept += self._vectors(terms, own)
        return Beside(own, tuple(kept))

    def _gathered(
        self, spans: Items[Span], terms: Terms, chosen: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.void], npt.NDArray[np.int64]] | None:
        """The terms of some products, product by product and there span by span, and how many each has."""
        parts = [(span, digest, weight) for span in spans for digest, weight in span.mix.parts]
        if not parts:
            return None
        listed = [self._of(terms.experts[digest]) for _, digest, _ in parts]
        made = np.stack([one.records[chosen] for one in listed], axis=1)
        present = np.stack([one.present[chosen] for one in listed], axis=1)
        made["start"] = [span.start for span, _, _ in parts]
        made["stop"] = [span.stop for span, _, _ in parts]
        made["factor"] *= np.array([weight for _, _, weight in parts], np.float32)
        place = 0
        for span in spans:
            count = len(span.mix.parts)
            before: npt.NDArray[np.int64] = (
                np.cumsum(present[:, place : place + count], axis=1) - present[:, place : place + count]
            )
            made["opens"][:, place : place + count] = before == 0
            place += count
        return np.ascontiguousarray(made[present]), present.sum(axis=1)

    def _vectors(self, terms: Terms, own: Records) -> list[object]:
        """Norms and biases of the step's mixes, entered into their operations."""
        moved, vectors = terms.moved(), self._weights.vectors
        sites = [i for i in np.flatnonzero(moved).tolist() if i in self._places]
        if not sites:
            return []
        stacked: dict[bool, tuple[torch.Tensor, torch.Tensor]] = {}
        for is_head, spans in ((False, terms.spans), (True, terms.logit_spans)):
            if spans:
                stacked[is_head] = vectors.stacked(spans, terms.experts), torch.from_numpy(rows_of(spans))
        for index in sites:
            record, head = own[self._places[index]], self._weights.sites[index].head
            if head not in stacked:
                continue
            choice = vectors.at(index, *stacked[head])
            chosen = choice.choices.get("weight" if record["kind"] == NORM else "bias")
            if chosen is not None:
                record["choices"], record["choice_bytes"] = chosen.data_ptr(), chosen.stride(0) * chosen.itemsize
                record["which"], record["bias_dtype"] = choice.which.data_ptr(), DTYPES[chosen.dtype]
        return [stacked]

    def _of(self, expert: DecodedExpert) -> _Listed:
        known = self._listed.get(expert)
        if known is None:
            records = np.zeros(len(self._names), TERM)
            present = np.zeros(len(self._names), np.bool_)
            is_served = self._unserved.isdisjoint(expert.tensors)
            for place, (name, shape) in enumerate(zip(self._names, self._shapes, strict=True)):
                delta = expert.tensors.get(name)
                if delta is None:
                    continue
                record = None if isinstance(delta, DenseValues | Overwrites) else self._kernels.term(delta)
                if record is None or rows_and_columns(delta.shape) != shape:
                    is_served = False
                    break
                records[place], present[place] = record, True
            known = self._listed[expert] = _Listed(records, present, is_served)
        return known
